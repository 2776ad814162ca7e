// Go's x/crypto/ssh as the lab's client. It plays the same plan as the others, see plan.py; SFTP is not part of it.
package main

import (
	"encoding/json"
	"io"
	"log"
	"math"
	"math/rand"
	"net"
	"os"
	"strconv"
	"time"

	"golang.org/x/crypto/ssh"
)

type reverse struct {
	Bind    string `json:"bind"`
	Port    int    `json:"port"`
	To_host string `json:"to_host"`
	To_port int    `json:"to_port"`
	Path    string `json:"path"`
}

type plan struct {
	Host            string          `json:"host"`
	Port            int             `json:"port"`
	User            string          `json:"user"`
	Key             string          `json:"key"`
	Seed            int64           `json:"seed"`
	Hold_s          float64         `json:"hold_s"`
	Cipher          string          `json:"cipher"`
	Mac             string          `json:"mac"`
	Reverse         []reverse       `json:"reverse"`
	Reverse_after_s float64         `json:"reverse_after_s"`
	Shell           []string        `json:"shell"`
	Commands        []string        `json:"commands"`
	Local           [][]interface{} `json:"local"`
}

func must(err error) {
	if err != nil {
		log.Fatal(err)
	}
}

func seconds(s float64) time.Duration { return time.Duration(s * float64(time.Second)) }

func join(one, two net.Conn) {
	go func() { io.Copy(one, two); one.Close() }()
	io.Copy(two, one)
	two.Close()
}

func ask(client *ssh.Client, one reverse) {
	var listener net.Listener
	var err error
	if one.Path != "" {
		listener, err = client.ListenUnix(one.Path)
	} else {
		listener, err = client.Listen("tcp", net.JoinHostPort(one.Bind, strconv.Itoa(one.Port)))
	}
	must(err)
	go func() {
		for {
			outer, err := listener.Accept()
			if err != nil {
				return
			}
			inner, err := net.Dial("tcp", net.JoinHostPort(one.To_host, strconv.Itoa(one.To_port)))
			must(err)
			go join(outer, inner)
		}
	}()
}

func shell(client *ssh.Client, p plan) {
	session, err := client.NewSession()
	must(err)
	must(session.RequestPty("xterm", 24, 80, ssh.TerminalModes{ssh.ECHO: 1}))
	in, err := session.StdinPipe()
	must(err)
	session.Stdout = io.Discard
	must(session.Shell())
	noise := rand.New(rand.NewSource(p.Seed))
	for _, line := range p.Shell {
		for _, key := range line + "\r" {
			_, err := in.Write([]byte(string(key)))
			must(err)
			time.Sleep(seconds(0.13 * math.Exp(noise.NormFloat64()*0.45)))
		}
	}
}

func main() {
	var p plan
	must(json.Unmarshal([]byte(os.Args[1]), &p))
	text, err := os.ReadFile(p.Key)
	must(err)
	key, err := ssh.ParsePrivateKey(text)
	must(err)
	config := &ssh.ClientConfig{User: p.User, Auth: []ssh.AuthMethod{ssh.PublicKeys(key)},
		HostKeyCallback: ssh.InsecureIgnoreHostKey()}
	if p.Cipher != "" {
		config.Ciphers = []string{p.Cipher}
	}
	if p.Mac != "" {
		config.MACs = []string{p.Mac}
	}
	client, err := ssh.Dial("tcp", net.JoinHostPort(p.Host, strconv.Itoa(p.Port)), config)
	must(err)
	end := time.Now().Add(seconds(p.Hold_s))
	all := func() {
		for _, one := range p.Reverse {
			ask(client, one)
		}
	}
	if p.Reverse_after_s > 0 {
		time.AfterFunc(seconds(p.Reverse_after_s), all)
	} else {
		all()
	}
	if len(p.Shell) > 0 {
		shell(client, p)
	}
	for _, command := range p.Commands {
		session, err := client.NewSession()
		must(err)
		session.Output(command)
		session.Close()
	}
	for _, one := range p.Local {
		inner, err := client.Dial("tcp", net.JoinHostPort(one[0].(string), strconv.Itoa(int(one[1].(float64)))))
		must(err)
		inner.Write([]byte("GET / HTTP/1.0\r\n\r\n"))
		io.Copy(io.Discard, inner)
		inner.Close()
	}
	time.Sleep(time.Until(end))
	client.Close()
}
