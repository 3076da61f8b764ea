// SPDX-License-Identifier: Apache-2.0

import java.io.BufferedReader;
import java.io.IOException;
import java.io.InputStreamReader;
import java.net.DatagramPacket;
import java.net.DatagramSocket;
import java.net.InetAddress;
import java.net.InetSocketAddress;
import java.net.Socket;
import java.net.SocketAddress;
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse;
import java.nio.ByteBuffer;
import java.nio.channels.DatagramChannel;
import java.nio.channels.SelectionKey;
import java.nio.channels.Selector;
import java.nio.channels.SocketChannel;
import java.nio.charset.StandardCharsets;
import java.time.Duration;
import java.util.Hashtable;
import javax.naming.Context;
import javax.naming.directory.InitialDirContext;

/** What Java's standard library sees of a VIP: Client VIP. Who answered, one name a line. */
public final class Client {
    private static final int PATIENCE_MS = 10_000;
    private static final byte[] HELLO = "hello\n".getBytes(StandardCharsets.US_ASCII);

    private static void said(String answer) {
        System.out.println(answer.split(" ")[0]);
    }

    private static void expect(Object got, Object want) throws IOException {
        if (!got.equals(want)) {
            throw new IOException(got + ", not " + want);
        }
    }

    private static void web(String vip) throws Exception {
        String host = vip.contains(":") ? "[" + vip + "]" : vip;
        HttpClient client = HttpClient.newBuilder().connectTimeout(Duration.ofMillis(PATIENCE_MS)).build();
        HttpRequest request = HttpRequest.newBuilder(URI.create("http://" + host + "/")).build();
        for (int i = 0; i < 3; i++) {
            said(client.send(request, HttpResponse.BodyHandlers.ofString()).body());
        }
    }

    private static void stream(InetSocketAddress to) throws IOException {
        try (Socket socket = new Socket()) {
            socket.connect(to, PATIENCE_MS);
            socket.setSoTimeout(PATIENCE_MS);
            expect(socket.getRemoteSocketAddress(), to);
            socket.getOutputStream().write(HELLO);
            said(new BufferedReader(new InputStreamReader(socket.getInputStream())).readLine());
        }
    }

    /** A connect() that does not wait. */
    private static void channel(InetSocketAddress to) throws IOException {
        try (Selector selector = Selector.open(); SocketChannel channel = SocketChannel.open()) {
            channel.configureBlocking(false);
            channel.connect(to);
            channel.register(selector, SelectionKey.OP_CONNECT);
            expect(selector.select(PATIENCE_MS), 1);
            expect(channel.finishConnect(), true);
            expect(channel.getRemoteAddress(), to);
            selector.keys().forEach(SelectionKey::cancel);
            selector.selectNow();
            channel.configureBlocking(true);
            channel.write(ByteBuffer.wrap(HELLO));
            said(new BufferedReader(new InputStreamReader(channel.socket().getInputStream())).readLine());
        }
    }

    /** A connected socket takes no datagram from anybody else, as does Java's own check. */
    private static void datagrams(InetSocketAddress to, boolean connected) throws IOException {
        try (DatagramSocket socket = new DatagramSocket()) {
            socket.setSoTimeout(PATIENCE_MS);
            if (connected) {
                socket.connect(to);
            }
            socket.send(new DatagramPacket(HELLO, HELLO.length, to));
            DatagramPacket answer = new DatagramPacket(new byte[1000], 1000);
            socket.receive(answer);
            expect(answer.getSocketAddress(), to);
            said(new String(answer.getData(), 0, answer.getLength(), StandardCharsets.US_ASCII));
        }
    }

    private static void datagramChannel(InetSocketAddress to) throws IOException {
        try (DatagramChannel channel = DatagramChannel.open()) {
            channel.send(ByteBuffer.wrap(HELLO), to);
            ByteBuffer answer = ByteBuffer.allocate(1000);
            SocketAddress from = channel.receive(answer);
            expect(from, to);
            said(new String(answer.array(), 0, answer.position(), StandardCharsets.US_ASCII));
        }
    }

    /** Java's own client of DNS, which talks to one server from a connected channel. */
    private static void resolve(String vip) throws Exception {
        Hashtable<String, String> environment = new Hashtable<>();
        environment.put(Context.INITIAL_CONTEXT_FACTORY, "com.sun.jndi.dns.DnsContextFactory");
        environment.put(Context.PROVIDER_URL, "dns://" + (vip.contains(":") ? "[" + vip + "]" : vip));
        environment.put("com.sun.jndi.dns.timeout.initial", String.valueOf(PATIENCE_MS));
        environment.put("com.sun.jndi.dns.timeout.retries", "1");
        InitialDirContext context = new InitialDirContext(environment);
        said(context.getAttributes("who.example", new String[] {"TXT"}).get("TXT").get().toString());
        context.close();
    }

    public static void main(String[] arguments) throws Exception {
        String vip = arguments[0];
        InetSocketAddress to = new InetSocketAddress(InetAddress.getByName(vip), 7);
        web(vip);
        stream(to);
        channel(to);
        datagrams(to, true);
        datagrams(to, false);
        datagramChannel(to);
        resolve(vip);
    }
}
