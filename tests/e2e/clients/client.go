// SPDX-License-Identifier: Apache-2.0

// What Go's standard library sees of a VIP: client VIP. Who answered, one name a line.
package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"time"
)

const patience = 10 * time.Second

func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func expect(what, got, want string) {
	if got != want {
		check(fmt.Errorf("%s: %s, not %s", what, got, want))
	}
}

func said(answer string) {
	fmt.Println(strings.Fields(answer)[0])
}

func web(vip string) {
	client := http.Client{Timeout: patience}
	for range 3 { // by one connection
		answer, err := client.Get("http://" + net.JoinHostPort(vip, "80") + "/")
		check(err)
		body, err := io.ReadAll(answer.Body)
		check(err)
		answer.Body.Close()
		expect("status", answer.Status, "200 OK")
		said(string(body))
	}
}

// A stream, and a datagram socket that is connected.
func talk(network, vip string) {
	to := net.JoinHostPort(vip, "7")
	conn, err := net.DialTimeout(network, to, patience)
	check(err)
	defer conn.Close()
	check(conn.SetDeadline(time.Now().Add(patience)))
	expect("remote address", conn.RemoteAddr().String(), to) // getpeername, at the dial
	_, err = fmt.Fprintln(conn, "hello")
	check(err)
	answer, err := bufio.NewReader(conn).ReadString('\n')
	check(err)
	said(answer)
}

func send(vip string) {
	to, err := net.ResolveUDPAddr("udp", net.JoinHostPort(vip, "7"))
	check(err)
	conn, err := net.ListenPacket("udp", ":0") // both families by one socket
	check(err)
	defer conn.Close()
	check(conn.SetDeadline(time.Now().Add(patience)))
	_, err = conn.WriteTo([]byte("hello"), to)
	check(err)
	answer := make([]byte, 1000)
	n, from, err := conn.ReadFrom(answer)
	check(err)
	expect("sender", from.String(), to.String())
	said(string(answer[:n]))
}

// Go's own resolver, with the VIP as its server.
func resolve(vip string) {
	resolver := net.Resolver{PreferGo: true, Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
		var dialer net.Dialer
		return dialer.DialContext(ctx, network, net.JoinHostPort(vip, "53"))
	}}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	texts, err := resolver.LookupTXT(ctx, "who.example.")
	check(err)
	said(texts[0])
	addresses, err := resolver.LookupHost(ctx, "host.example.")
	check(err)
	if len(addresses) != 2 {
		check(fmt.Errorf("addresses: %v", addresses))
	}
}

func main() {
	vip := os.Args[1]
	web(vip)
	talk("tcp", vip)
	talk("udp", vip)
	send(vip)
	resolve(vip)
}
