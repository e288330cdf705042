// Command streams is a client of the streaming server of a container runtime, on the
// library that kubectl streams with.
//
//	streams run TRANSPORT URL [WIDTHxHEIGHT]
//
// connects its own standard streams to those of the program that URL stands for, an
// answer of the CRI's Exec or Attach. With a size it is a terminal of that size; a line
// "WIDTHxHEIGHT" on descriptor 3, if that is open, changes it. Its exit code is the
// program's.
//
//	streams forward TRANSPORT URL PORT...
//
// listens on a port of its own for each PORT of the pod, an answer of PortForward, and
// prints "Forwarding from ADDRESS:LOCAL -> PORT" for each. It ends with its input.
//
// TRANSPORT is spdy or websocket. Errors of its own end it with 125.
package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"

	"k8s.io/apimachinery/pkg/util/httpstream"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/portforward"
	"k8s.io/client-go/tools/remotecommand"
	"k8s.io/client-go/transport/spdy"
	"k8s.io/client-go/util/exec"
)

// Set when it is built: the version of the library.
var version = "unknown"

func main() {
	err := act(os.Args[1:])
	var ended exec.CodeExitError
	switch {
	case err == nil:
	case errors.As(err, &ended):
		os.Exit(ended.Code)
	default:
		fmt.Fprintf(os.Stderr, "streams (client-go %s): %v\n", version, err)
		os.Exit(125)
	}
}

func act(args []string) error {
	if len(args) < 3 {
		return errors.New("streams run|forward spdy|websocket URL ...")
	}
	target, err := url.Parse(args[2])
	if err != nil {
		return err
	}
	config := &rest.Config{Host: target.Host}
	switch args[0] {
	case "run":
		return run(config, args[1], target, args[3:])
	case "forward":
		return forward(config, args[1], target, args[3:])
	}
	return fmt.Errorf("%q is neither run nor forward", args[0])
}

func executor(config *rest.Config, transport string, target *url.URL) (remotecommand.Executor, error) {
	switch transport {
	case "spdy":
		return remotecommand.NewSPDYExecutor(config, http.MethodPost, target)
	case "websocket":
		return remotecommand.NewWebSocketExecutor(config, http.MethodGet, target.String())
	}
	return nil, fmt.Errorf("%q is neither spdy nor websocket", transport)
}

func run(config *rest.Config, transport string, target *url.URL, size []string) error {
	executor, err := executor(config, transport, target)
	if err != nil {
		return err
	}
	options := remotecommand.StreamOptions{Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr}
	if len(size) > 0 {
		first, err := parse(size[0])
		if err != nil {
			return err
		}
		options.Tty = true
		options.Stderr = nil
		options.TerminalSizeQueue = sizes(first, os.NewFile(3, "sizes"))
	}
	return executor.StreamWithContext(context.Background(), options)
}

func parse(text string) (remotecommand.TerminalSize, error) {
	var size remotecommand.TerminalSize
	_, err := fmt.Sscanf(text, "%dx%d", &size.Width, &size.Height)
	return size, err
}

type queue chan remotecommand.TerminalSize

func (sizes queue) Next() *remotecommand.TerminalSize {
	size, ok := <-sizes
	if !ok {
		return nil
	}
	return &size
}

func sizes(first remotecommand.TerminalSize, later io.Reader) queue {
	queue := make(queue, 1)
	queue <- first
	go func() {
		lines := bufio.NewScanner(later)
		for lines.Scan() {
			if size, err := parse(lines.Text()); err == nil {
				queue <- size
			}
		}
	}()
	return queue
}

func dialer(config *rest.Config, transport string, target *url.URL) (httpstream.Dialer, error) {
	switch transport {
	case "spdy":
		tripper, upgrader, err := spdy.RoundTripperFor(config)
		if err != nil {
			return nil, err
		}
		return spdy.NewDialer(upgrader, &http.Client{Transport: tripper}, http.MethodPost, target), nil
	case "websocket":
		return portforward.NewSPDYOverWebsocketDialer(target, config)
	}
	return nil, fmt.Errorf("%q is neither spdy nor websocket", transport)
}

func forward(config *rest.Config, transport string, target *url.URL, ports []string) error {
	dialer, err := dialer(config, transport, target)
	if err != nil {
		return err
	}
	for index, port := range ports {
		ports[index] = "0:" + port
	}
	stop := make(chan struct{})
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		close(stop)
	}()
	addresses := []string{"127.0.0.1"}
	forwarder, err := portforward.NewOnAddresses(dialer, addresses, ports, stop, make(chan struct{}), os.Stdout, os.Stderr)
	if err != nil {
		return err
	}
	return forwarder.ForwardPorts()
}
