// Prints what Go's own resolver (not libc's: CGO_ENABLED=0) says of a name: addresses, or the error.
package main

import (
	"fmt"
	"net"
	"os"
)

func main() {
	found, err := net.LookupHost(os.Args[1])
	if err != nil {
		fmt.Println("error:", err)
		os.Exit(1)
	}
	for _, address := range found {
		fmt.Println(address)
	}
}
