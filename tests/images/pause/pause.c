/*
 * The process that keeps a peer's pod sandbox alive in the benchmark: it waits,
 * reaps orphans and ends when told to. Berth itself needs none. Static and tiny,
 * so that the peer's memory per pod is not made to look larger than it is.
 */
#include <signal.h>
#include <stddef.h>
#include <sys/wait.h>
#include <unistd.h>

static void end(int signal)
{
    (void)signal;
    _exit(0);
}

static void reap(int signal)
{
    (void)signal;
    while (waitpid(-1, NULL, WNOHANG) > 0) {
    }
}

int main(void)
{
    signal(SIGINT, end);
    signal(SIGTERM, end);
    signal(SIGCHLD, reap);
    for (;;)
        pause();
}
