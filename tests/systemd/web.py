import http.server, ssl

class Handler(http.server.SimpleHTTPRequestHandler):
    def translate_path(self, path):
        return "/run/web/" + path.rsplit("/", 1)[1]

server = http.server.ThreadingHTTPServer(("127.0.0.1", 443), Handler)
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain("/root/web.pem", "/root/web.key")
server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
server.serve_forever()
