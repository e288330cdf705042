/* Prints its effective user. Setuid root in the image; with no_new_privs the bit has no effect. */
#include <stdio.h>
#include <unistd.h>

int main(void)
{
	printf("Effective uid: %d\n", geteuid());
	return 0;
}
