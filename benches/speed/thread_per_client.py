# Sends the time, or the given file, to each client in a separate thread.
import base64
import datetime
import json
import os
import socketserver
import sys


class Handler(socketserver.BaseRequestHandler):
    def handle(self):
        self.request.sendall(document() if sys.argv[1:] else time())


class Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    request_queue_size = 1024


def time():
    return (datetime.datetime.now().isoformat(" ", "microseconds") + "\n").encode()


def document():
    with open(sys.argv[1], "rb") as file:
        data = base64.b64encode(file.read()).decode()
    reply = {"filename": os.path.basename(sys.argv[1]), "filedata": data}
    return (json.dumps(reply, separators=(",", ":")) + "\n").encode()


with Server(("127.0.0.1", 0), Handler) as server:
    print("%s:%s" % server.server_address, flush=True)
    server.serve_forever()
