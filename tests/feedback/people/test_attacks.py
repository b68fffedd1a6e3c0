"""Web attacks on the label page, one line each: all are refused, nothing is kept, and the page works as before."""

from __future__ import annotations

import json

import pytest

from tests.feedback.people import wire
from tests.feedback.people.conftest import Served

GOOD = {"annotator": "kim", "item": "ITEM", "ranks": [1, 2], "margin": 1, "done": True}
FORM = b"annotator=kim&item=ITEM&done=true"


def good(**changes):
    """The body of a label that would be kept, but for the changes."""
    return json.dumps({**GOOD, **changes}).encode()


def without(name):
    return json.dumps({k: v for k, v in GOOD.items() if k != name}).encode()


def post(body=None, path="/TOKEN/api/label", method="POST", **headers):
    """The page's own request, but for the changes; a header of None is left out."""
    content = good() if body is None else body
    own = {"Host": "127.0.0.1:PORT", "Origin": "http://127.0.0.1:PORT", "Content-Type": "application/json"}
    own |= {"Content-Length": str(len(content))}
    return method, path, {**own, **{k.replace("_", "-"): v for k, v in headers.items()}}, content


def get(path="/TOKEN/api/people", method="GET", **headers):
    own = {"Host": "127.0.0.1:PORT"}
    return method, path, {**own, **{k.replace("_", "-"): v for k, v in headers.items()}}, b""


def chunked(size):
    chunks = b"".join(b"4000\r\n" + b" " * 0x4000 + b"\r\n" for _ in range(size // 0x4000 + 1)) + b"0\r\n\r\n"
    method, path, headers, _ = post(b"", Content_Length=None, Transfer_Encoding="chunked")
    return method, path, headers, chunks


JSON = "application/json"
ATTACKS = {
    # the page under another name: DNS rebinding and its tricks
    "rebound name": (403, get(Host="evil.example:PORT")),
    "rebound name, label": (403, post(Host="evil.example:PORT", Origin="http://evil.example:PORT")),
    "name that resolves to loopback": (403, get(Host="127.0.0.1.nip.io:PORT")),
    "name that begins like ours": (403, get(Host="localhost.evil.example")),
    "name that ends like ours": (403, get(Host="evil-localhost")),
    "user before another host": (403, get(Host="127.0.0.1:PORT@evil.example")),
    "fragment behind another host": (403, get(Host="evil.example#127.0.0.1")),
    "two hosts in one": (400, get(Host="127.0.0.1:PORT, evil.example")),
    "two hosts in two headers": (400, get(Host="127.0.0.1:PORT\r\nHost: evil.example")),
    "any address": (403, get(Host="0.0.0.0:PORT")),
    "loopback as one number": (403, get(Host="2130706433:PORT")),
    "bracket never closed": (400, get(Host="[::1")),
    "empty host": (403, get(Host="")),
    "no host": (400, get(Host=None)),
    "absolute target of another host": (403, get("http://evil.example/TOKEN/api/people")),
    # labels from other pages
    "no origin": (403, post(Origin=None)),
    "foreign origin": (403, post(Origin="http://evil.example")),
    "origin of a sandboxed frame": (403, post(Origin="null")),
    "origin of a file": (403, post(Origin="file://")),
    "our host over https": (403, post(Origin="https://127.0.0.1:PORT")),
    "another port of this machine": (403, post(Origin="http://127.0.0.1:1")),
    "another name of this machine": (403, post(Origin="http://localhost:PORT")),
    "origin with a user": (403, post(Origin="http://127.0.0.1:PORT@evil.example")),
    "origin with a path": (403, post(Origin="http://127.0.0.1:PORT/x")),
    "origin that begins like ours": (403, post(Origin="http://127.0.0.1:PORT.evil.example")),
    "origin that is no place": (400, post(Origin="http://[::1")),
    "reading from a foreign page": (403, get(Origin="http://evil.example")),
    "cross-site by its own word": (403, post(Sec_Fetch_Site="cross-site")),
    "same-site, another port": (403, post(Sec_Fetch_Site="same-site")),
    "referer in place of an origin": (403, post(Origin=None, Referer="http://127.0.0.1:PORT/TOKEN/")),
    # what a plain form can send
    "text/plain": (415, post(Content_Type="text/plain")),
    "form": (415, post(FORM, Content_Type="application/x-www-form-urlencoded")),
    "multipart": (415, post(FORM, Content_Type="multipart/form-data; boundary=x")),
    "no content type": (415, post(Content_Type=None)),
    "content type that begins like ours": (415, post(Content_Type="application/json-patch")),
    "our content type as a parameter": (415, post(Content_Type="text/plain; a=application/json")),
    "undo by a form": (415, post(FORM, path="/TOKEN/api/undo", Content_Type="text/plain")),
    # without the key
    "no token": (403, get("/")),
    "no token, label": (403, post(path="/api/label")),
    "no token, page": (403, get("/label.js")),
    "wrong token": (403, get("/a-token-of-this-tesT/")),
    "part of the token": (403, get("/a-token-of-this/")),
    "token and more": (403, get("/TOKENx/")),
    "token in capitals": (403, get("/A-TOKEN-OF-THIS-TEST/")),
    "token as a query": (403, get("/?token=TOKEN")),
    "token as a header": (403, get("/api/people", Authorization="Bearer TOKEN")),
    "token as a cookie": (403, get("/api/people", Cookie="token=TOKEN")),
    "token without its slash": (403, get("/TOKEN")),
    "token behind a detour": (403, get("/x/../TOKEN/")),
    "token behind two slashes": (403, get("//TOKEN/")),
    "token and a null byte": (403, get("/TOKEN%00/")),
    "token that is no ASCII": (403, get("/%ff%fe/")),
    # files that are none of the page's
    "up to the system": (404, get("/TOKEN/../../../../etc/passwd")),
    "up, encoded": (404, get("/TOKEN/%2e%2e/%2e%2e/etc/passwd")),
    "up, with encoded slashes": (404, get("/TOKEN/..%2f..%2f..%2fetc%2fpasswd")),
    "up, encoded twice": (404, get("/TOKEN/%252e%252e%252fetc%252fpasswd")),
    "up, backwards": (404, get("/TOKEN/..%5c..%5capp.py")),
    "up from a file": (404, get("/TOKEN/label.css/../../store.py")),
    "up, dots that survive a filter": (404, get("/TOKEN/....//....//app.py")),
    "an absolute path": (404, get("/TOKEN//etc/passwd")),
    "a file and a null byte": (404, get("/TOKEN/label.css%00.html")),
    "the labels": (404, get("/TOKEN/labels.jsonl")),
    "git": (404, get("/TOKEN/.git/config")),
    "a URL as a path": (404, get("/TOKEN/file:///etc/passwd")),
    # methods
    "label by GET": (405, get("/TOKEN/api/label?annotator=kim&done=true")),
    "label by HEAD": (405, get("/TOKEN/api/label", method="HEAD")),
    "label by PUT": (405, post(method="PUT")),
    "label by DELETE": (405, post(method="DELETE")),
    "label by an overridden method": (405, get("/TOKEN/api/label", X_HTTP_Method_Override="POST")),
    "preflight": (403, get("/TOKEN/api/label", method="OPTIONS", Origin="http://evil.example")),
    "trace": (403, get("/TOKEN/", method="TRACE")),
    "writing a file": (405, post(path="/TOKEN/label.js", method="PUT")),
    "a method of our own page's making": (405, post(method="BREW")),
    "posting to what is read": (405, post(path="/TOKEN/api/items")),
    # bodies
    "no JSON": (400, post(b"{")),
    "a list": (400, post(b"[1]")),
    "null": (400, post(b"null")),
    "nested lists": (400, post(b"[" * 100_000)),
    "nested objects": (400, post(b'{"a":' * 20_000 + b"1" + b"}" * 20_000)),
    "not a number": (400, post(good().replace(b'"margin": 1', b'"margin": NaN'))),
    "infinity": (400, post(good().replace(b'"margin": 1', b'"margin": 1e999'))),
    "a number of 5,000 digits": (400, post(good().replace(b'"margin": 1', b'"margin": ' + b"9" * 5000))),
    "no UTF-8": (400, post(good().replace(b"kim", b"\xff\xfe"))),
    "a large body": (413, post(good(reason="x" * 200_000))),
    "a large body by its word": (413, post(Content_Length="99999999999")),
    "a large body in chunks": (413, chunked(200_000)),
    "a negative length": (400, post(Content_Length="-1")),
    "two lengths, smuggled": (400, post(Transfer_Encoding="chunked", Content_Length="5, 6")),
    "endless headers": (400, get(X_A="a" * 2_000_000)),
    # fields
    "no annotator": (400, post(without("annotator"))),
    "annotator of spaces": (400, post(good(annotator="  "))),
    "annotator as an object": (400, post(good(annotator={"$ne": None}))),
    "annotator of many letters": (400, post(good(annotator="k" * 65))),
    "annotator of two lines": (400, post(good(annotator="kim\r\nSet-Cookie: a=b"))),
    "annotator written backwards": (400, post(good(annotator="kim\u202egpj"))),
    "annotator with a null byte": (400, post(good(annotator="kim\x00"))),
    "half a character": (400, post(good().replace(b'"kim"', b'"\\ud800"'))),
    "item that is not there": (404, post(good(item="0" * 20))),
    "item as a path": (404, post(good(item="../../etc/passwd"))),
    "item as a list": (404, post(good(item=["ITEM"]))),
    "a field of objects' parents": (400, post(good(__proto__={"done": True}))),
    "an order of one's own": (400, post(good(order=[1, 0]))),
    "a time of one's own": (400, post(good(time=0))),
    "too few ranks": (400, post(good(ranks=[1]))),
    "too many ranks": (400, post(good(ranks=[1] * 10_000))),
    "ranks of another kind": (400, post(good(ranks=["1", "2"]))),
    "true is no rank": (400, post(good(ranks=[True, False]))),
    "flags of another kind": (400, post(good(unsafe=[0, 1]))),
    "a margin beyond": (400, post(good(margin=4))),
    "done, as a word": (400, post(good(done="false"))),
    "done, of nothing": (400, post(good(ranks=None))),
    "a reason without end": (400, post(good(reason="x" * 10_001))),
    "a place below zero": (400, get("/TOKEN/api/items?annotator=kim&from=-1")),
    "a place in other digits": (400, get("/TOKEN/api/items?annotator=kim&from=%D9%A1")),
    "a place of 10,000 digits": (400, get("/TOKEN/api/items?annotator=kim&from=" + "9" * 10_000)),
    "a new line in a query": (400, get("/TOKEN/api/start?annotator=kim%0d%0aSet-Cookie:a=b")),
    # answers that could be made to say something
    "a header in a path": (404, get("/TOKEN/x%0d%0aSet-Cookie:%20a=b")),
    "a script in a path": (404, get("/TOKEN/%3Cscript%3Ealert(1)%3C/script%3E")),
    "a script in a query": (400, get("/TOKEN/api/items?annotator=kim&from=%3Cscript%3E")),
    "a script in a field's name": (400, post(good(**{"<img src=x onerror=alert(1)>": 1}))),
    "a callback": (404, get("/TOKEN/api/people.js?callback=alert")),
    "a redirect elsewhere": (404, get("/TOKEN//evil.example/")),
    "a redirect by a slash": (404, get("/TOKEN/api/people/")),
    "a redirect without the token": (403, get("//evil.example/%2f..")),
    # other protocols
    "a websocket": (403, get("/", Upgrade="websocket", Connection="Upgrade", Sec_WebSocket_Version="13")),
    "a websocket with the token": (405, get("/TOKEN/api/label", Upgrade="websocket", Sec_WebSocket_Version="13")),
    "HTTP/2 by an upgrade": (405, get("/TOKEN/api/label", Upgrade="h2c", HTTP2_Settings="AAMAAABk")),
}  # fmt: skip


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    served = Served([{"prompt": "p", "responses": ["a", "b"]}], tmp_path_factory.mktemp("desk") / "labels.jsonl")
    yield served.start()
    # after all of them the page takes a label as ever
    item = wire.ask(served, "GET", "api/items?annotator=kim").json()["items"][0]
    assert wire.ask(served, "POST", "api/label", {**GOOD, "item": item["id"]}).status == 200
    assert [label.annotator for label in served.store] == ["kim"]
    served.stop()


@pytest.mark.parametrize("name", ATTACKS)
def test_attack(name, served):
    status, (method, path, headers, body) = ATTACKS[name]
    identity, before = served.items[0][0], served.store.path.read_bytes()

    def filled(text):
        return text.replace("TOKEN", served.url.split("/")[3]).replace("PORT", str(served.port))

    pairs = [(key, filled(value)) for key, value in headers.items() if value is not None]
    body = body.replace(b"ITEM", identity.encode())
    pairs = [(k, str(len(body)) if k == "Content-Length" and v.isdigit() and int(v) < 10**6 else v) for k, v in pairs]
    answer = wire.send(served.port, wire.request(method, filled(path), pairs, body))
    assert answer.status == status, answer.body[:200]
    assert served.store.path.read_bytes() == before
    assert not {"location", "set-cookie", "access-control-allow-origin"} & set(answer.headers)
    assert served.url.split("/")[3].encode() not in answer.body
    if "content-security-policy" in answer.headers:  # h11 answers malformed requests itself, as plain text
        assert answer.headers["content-type"] == "application/json" and b"<" not in answer.body
    else:
        assert (
            answer.headers["content-type"].startswith("text/plain") and answer.body == b"Invalid HTTP request received."
        )


def test_the_request_that_the_attacks_change_is_itself_taken(serve):
    """Else any of them might be refused for a reason of its own."""
    served = serve([{"prompt": "p", "responses": ["a", "b"]}])
    method, path, headers, body = post()
    body = body.replace(b"ITEM", served.items[0][0].encode())
    token = served.url.split("/")[3]
    pairs = [(k, v.replace("PORT", str(served.port))) for k, v in headers.items() if k != "Content-Length"]
    pairs.append(("Content-Length", str(len(body))))
    assert wire.send(served.port, wire.request(method, path.replace("TOKEN", token), pairs, body)).status == 200
    _, path, headers, _ = get()
    pairs = [(k, v.replace("PORT", str(served.port))) for k, v in headers.items()]
    assert wire.send(served.port, wire.request("GET", path.replace("TOKEN", token), pairs)).status == 200
    assert len(list(served.store)) == 1
