import asyncore, os, smtpd

FOLDER = "/run/mails"

def say(name, text):
    with open(f"{FOLDER}/{name}.new", "wb") as file:
        file.write(text)
    os.rename(f"{FOLDER}/{name}.new", f"{FOLDER}/{name}")

class Server(smtpd.SMTPServer):
    def process_message(self, peer, sender, recipients, content, **_):
        stored = sum(name.isdigit() for name in os.listdir(FOLDER))
        say(str(stored), content)

again = os.path.exists(f"{FOLDER}/port")
port = int(open(f"{FOLDER}/port").read()) if again else 0
server = Server(("127.0.0.1", port), None)
say("again" if again else "port", str(server.socket.getsockname()[1]).encode())
asyncore.loop()
