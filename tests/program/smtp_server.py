"""A mail server for the tests, based on aiosmtpd. Stores each mail raw and as parsed by Python's `email`.

Its argument is JSON: `folder`, `security` (tls, starttls or none), `host`, `port`, `certificate`, `key`,
`login` (a list of user and password, or null), `without` (a list of mechanisms that are not offered).
It prints its port when it listens.

Files in the folder switch modes: `busy` rejects mails temporarily; `mute` accepts them without a reply;
`cut` accepts them and resets the connection without a reply; `small` rejects mails with attachments.
"""

import asyncio
import json
import os
import ssl
import sys
from base64 import b64encode
from email import message_from_bytes, policy
from email.header import decode_header, make_header

from aiosmtpd.smtp import SMTP, AuthResult, LoginPassword

OPTIONS = json.loads(sys.argv[1])
FOLDER = OPTIONS["folder"]


def ordered(what):
    return os.path.exists(os.path.join(FOLDER, what))


def without_rfc2231(part):
    """The file name as read by clients that only know `name=` of Content-Type."""
    name = part.get_param("name")
    return name and str(make_header(decode_header(name)))


def read(content):
    mail = message_from_bytes(content, policy=policy.default)
    old = [part for part in message_from_bytes(content).walk() if part.get_filename()]
    people = lambda name: [[one.display_name, one.addr_spec] for one in mail[name].addresses]
    return {
        "headers": {name.lower(): str(value) for name, value in mail.items()},
        "from": people("from"),
        "to": people("to"),
        "defects": [repr(defect) for part in mail.walk() for defect in part.defects],
        "text": mail.get_body(("plain",)).get_content(),
        "attachments": [
            {
                "filename": part.get_filename(),
                "name": without_rfc2231(old_part),
                "type": part.get_content_type(),
                "encoding": part["content-transfer-encoding"],
                "content": b64encode(part.get_payload(decode=True)).decode(),
            }
            for part, old_part in zip(mail.iter_attachments(), old)
        ],
    }


class Handler:
    stored = 0

    async def handle_RCPT(self, server, session, envelope, address, options):
        if address.startswith("nobody@"):
            return "550 5.1.1 no such user here"
        if address.startswith("later@"):
            return "451 4.2.0 the mailbox is busy"
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, server, session, envelope):
        if ordered("busy"):
            return "451 4.3.2 not now"
        mail = read(envelope.content)
        if ordered("small") and mail["attachments"]:
            return "552 5.3.4 message size exceeds the limit"
        mail["envelope"] = [envelope.mail_from, envelope.rcpt_tos]
        mail["tls"] = server.transport.get_extra_info("cipher") is not None
        mail["mechanism"] = getattr(session, "mechanism", None)
        path = os.path.join(FOLDER, "%04d" % self.stored)
        self.stored += 1
        with open(path + ".eml", "wb") as file:
            file.write(envelope.content)
        with open(path + ".new", "w") as file:
            json.dump(mail, file)
        os.rename(path + ".new", path + ".json")
        if ordered("mute"):
            await asyncio.Event().wait()
        if ordered("cut"):
            server.transport.abort()
        return "250 OK"


def authenticate(server, session, envelope, mechanism, data):
    user, password = (text.encode() for text in OPTIONS["login"])
    session.mechanism = mechanism
    known = data == LoginPassword(user, password)
    return AuthResult(success=known, handled=False)


async def main():
    loop = asyncio.get_running_loop()
    context = None
    if OPTIONS["security"] != "none":
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(OPTIONS["certificate"], OPTIONS["key"])
    at_once, later = (context, None) if OPTIONS["security"] == "tls" else (None, context)
    handler = Handler()

    def connection():
        return SMTP(
            handler,
            hostname="mail.example.org",
            tls_context=later,
            require_starttls=later is not None,
            auth_required=OPTIONS["login"] is not None,
            # It does not know of an encryption from the first byte.
            auth_require_tls=later is not None,
            auth_exclude_mechanism=OPTIONS["without"],
            authenticator=authenticate if OPTIONS["login"] else None,
            loop=loop,
        )

    server = await loop.create_server(
        connection, OPTIONS["host"], OPTIONS["port"], ssl=at_once, reuse_port=True
    )
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


asyncio.run(main())
