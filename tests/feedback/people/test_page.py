"""The real page in a real browser. Skipped, and says so, where there is no playwright or no Chromium."""

from __future__ import annotations

import http.server
import threading

import pytest

from rlhf_fast.feedback.people.store import Store

PAIRS = [{"prompt": f"prompt {i}", "responses": [f"good {i}", f"poor {i}"]} for i in range(9)]
FOUR = [{"prompt": "p", "responses": ["first", "second", "third", "fourth"]}]


def test_everything_of_two_works_from_the_keyboard(serve, tab):
    """Name, seven steps of the scale, tie, both bad, skip, undo, reason: no mouse, and each in the file at once."""
    served = serve(PAIRS)
    t = tab(served, annotator=None)
    t.annotator = "김민지"
    t.page.keyboard.insert_text("김민지")
    t.page.keyboard.press("Enter")
    t.page.wait_for_selector("#item:not([hidden])")
    expected = {"1": (1, 3), "2": (1, 2), "3": (1, 1), "4": (0, None), "5": (2, 1), "6": (2, 2), "7": (2, 3)}
    for n, (key, (best, margin)) in enumerate(expected.items()):
        prompt, shown = t.prompt(), t.shown()
        assert prompt == f"prompt {n}" and t.page.locator("#status").text_content() == f"Item {n + 1} of 9"
        t.press(key)
        found, said = t.label(prompt)
        ranks = [1, 1] if not best else [1, 2] if best == 1 else [2, 1]
        assert said["ranks"] == dict(zip(shown, ranks)) and found.margin == margin and found.done
    prompt = t.prompt()
    t.page.keyboard.press("r")
    t.page.keyboard.insert_text("둘 다 <b>틀림</b>")
    t.page.keyboard.press("Enter")
    t.press("x")
    found, said = t.label(prompt)
    assert found.bad and found.done and found.reason == "둘 다 <b>틀림</b>" and set(said["ranks"].values()) == {1}
    t.press("s")
    assert t.page.locator("#end-text").text_content() == "8 labelled, 1 skipped, of 9."
    t.press("u")
    assert t.prompt() == "prompt 8" and t.label("prompt 8")[0] is None
    t.press("u")
    assert t.prompt() == "prompt 7" and t.label("prompt 7")[0] is None
    t.press("ArrowRight", "ArrowLeft")
    assert (t.label("prompt 7")[0].margin, t.label("prompt 8")[0].margin) == (2, 2)


def test_letters_are_found_on_a_korean_keyboard(serve, tab):
    t = tab(serve(PAIRS))
    shown = t.shown()
    t.page.evaluate("document.dispatchEvent(new KeyboardEvent('keydown', {key: 'ㅠ', code: 'KeyB', bubbles: true}))")
    t.settle()
    assert t.label("prompt 0")[1]["ranks"] == dict(zip(shown, [2, 1]))


def test_a_held_key_labels_one_item(serve, tab):
    served = serve(PAIRS)
    t = tab(served)
    for _ in range(5):
        t.page.keyboard.down("2")  # the second and later ones are repeats
    t.settle()
    assert served.store.counts("kim") == {"labelled": 1, "skipped": 0}


def test_everything_of_two_works_with_the_mouse(serve, tab):
    t = tab(serve(PAIRS))
    shown = t.shown()
    t.page.get_by_label("Reason").fill("because")
    t.page.get_by_role("button", name="B is slightly better").click()
    t.settle()
    found, said = t.label("prompt 0")
    assert said["ranks"] == dict(zip(shown, [2, 1])) and (found.margin, found.reason) == (1, "because")
    t.page.get_by_role("button", name="Undo").click()
    t.settle()
    assert t.prompt() == "prompt 0" and t.label("prompt 0")[0] is None
    t.page.get_by_role("button", name="Both bad").click()
    t.settle()
    assert t.label("prompt 0")[0].bad
    t.page.get_by_role("button", name="Skip").click()
    t.settle()
    assert t.label("prompt 1")[0].skipped
    t.page.get_by_role("button", name="Item before").click()
    t.settle()
    assert t.prompt() == "prompt 1"


def test_a_reason_written_later_is_added_to_the_answer(serve, tab):
    t = tab(serve(PAIRS))
    t.press("1", "[")
    assert t.page.get_by_role("button", name="A is much better").get_attribute("aria-pressed") == "true"
    t.page.keyboard.press("r")
    t.page.keyboard.insert_text("later")
    t.page.keyboard.press("Escape")
    t.settle()
    found, _ = t.label("prompt 0")
    assert (found.reason, found.margin, found.done) == ("later", 3, True) and t.prompt() == "prompt 0"


def test_safety_is_a_question_of_its_own_and_the_first_answer_is_kept_before_the_second(serve, tab):
    t = tab(serve(PAIRS, safety=True))
    shown = t.shown()
    t.press("1")
    found, _ = t.label("prompt 0")
    assert found.margin == 3 and not found.done and t.prompt() == "prompt 0"
    t.press("Shift+A", "e")
    found, said = t.label("prompt 0")
    assert found.done and t.prompt() == "prompt 1"
    assert said["safer"] == dict(zip(shown, [2, 1])) and said["unsafe"] == dict(zip(shown, [True, False]))
    assert said["ranks"] == dict(zip(shown, [1, 2]))
    t.press("w", "5")  # the other way round
    found, said = t.label("prompt 1")
    assert found.done and set(said["safer"].values()) == {1} and set(said["unsafe"].values()) == {False}


def test_a_ranking_is_typed(serve, tab):
    t = tab(serve(FOUR))
    a, b, c, d = t.shown()
    t.press("c", "=", "a", "d", "b")
    found, said = t.label("p")
    assert said["ranks"] == {c: 1, a: 1, d: 2, b: 3} and not found.done  # kept, though not yet said to be final
    t.press("Enter")
    assert t.label("p")[0].done and t.page.locator("#end-title").text_content() == "All done"
    t.page.reload()
    t.page.wait_for_selector("#end:not([hidden])")
    t.press("u")
    t.press("d", "Enter")  # the rest stays as it stood
    assert t.label("p")[1]["ranks"] == {d: 1, a: 2, b: 3, c: 4}


def test_a_ranking_is_dragged(serve, tab):
    t = tab(serve(FOUR))
    a, b, c, d = t.shown()
    boxes = [chip.bounding_box() for chip in t.page.locator(".chip").all()]
    middle = [(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2) for box in boxes]
    t.page.mouse.move(*middle[3])
    t.page.mouse.down()
    t.page.mouse.move(*middle[1], steps=8)
    t.page.mouse.up()
    t.settle()
    assert t.label("p")[1]["ranks"] == {a: 1, d: 2, b: 3, c: 4}
    t.page.get_by_role("button", name=f"{'D'} is better than B").click()
    t.settle()
    assert t.label("p")[1]["ranks"] == {a: 1, d: 2, b: 2, c: 3}
    t.page.get_by_role("button", name="Save").click()
    t.settle()
    assert t.label("p")[0].done


def test_a_chip_in_focus_is_moved_by_arrows(serve, tab):
    t = tab(serve(FOUR))
    a, b, c, d = t.shown()
    t.page.locator(".chip").first.focus()
    t.press("ArrowRight", "ArrowRight")
    assert t.label("p")[1]["ranks"] == {b: 1, c: 2, a: 3, d: 4}
    assert t.page.evaluate("document.activeElement.textContent") == "A"


def test_each_person_goes_on_where_they_stopped(serve, tab):
    served = serve(PAIRS)
    t = tab(served)
    t.press("1", "1", "s")
    t.page.reload()
    t.page.wait_for_selector("#item:not([hidden])")
    assert t.prompt() == "prompt 3" and t.page.locator("#count").text_content() == "3 of 9"
    other = tab(served, annotator="mina")
    assert other.prompt() == "prompt 0"
    other.press("1")
    other.page.locator("#people").click()
    other.page.wait_for_selector("#people-dialog[open]")
    assert other.page.locator("#people-rows").inner_text().split() == ["kim", "2", "1", "mina", "1", "0"]


def test_when_the_server_is_gone_the_page_says_that_nothing_was_saved(serve, tab):
    served = serve(PAIRS)
    t = tab(served)
    served.server.should_exit = True
    served.thread.join(10)
    t.press("1")
    assert "Not saved. The server does not answer" in t.page.locator("#trouble").text_content()
    assert t.page.locator("#trouble").is_visible() and t.prompt() == "prompt 0"
    t.complaints.clear()  # the browser's own word about the connection


# ---- what others wrote

HOSTILE = [
    "<script>pwned=1</script>",
    "<img src=x onerror=pwned=1>",
    "<svg/onload=pwned=1>",
    "</p></article></main><script>pwned=1</script>",
    "</script><script>pwned=1</script>",
    "<iframe srcdoc='<script>parent.pwned=1</script>'></iframe>",
    "<a href='javascript:pwned=1' autofocus onfocus=pwned=1>x</a>",
    "<style>*{display:none}</style>",
    "<link rel=stylesheet href=http://evil.example/x.css>",
    "<meta http-equiv=refresh content='0;url=http://evil.example'>",
    "<base href=http://evil.example/>",
    "<form action=http://evil.example><input name=x></form>",
    '"><img src=x onerror=pwned=1>',
    "' onmouseover='pwned=1",
    "javascript:pwned=1",
    "{{constructor.constructor('pwned=1')()}} ${pwned=1} <%= pwned=1 %>",
    "&lt;script&gt;pwned=1&lt;/script&gt;",
    "<!--<script>--><script>pwned=1</script>",
    "![x](http://evil.example/x.png) [x](javascript:pwned=1)",
    "```\n<script>pwned=1</script>\n```",
    "\u202ereversed\u2066 \u2028 \u2029 \ufeff \x0b \x7f",
]


def test_what_models_and_people_wrote_is_text_and_nothing_else(serve, tab):
    """As prompt, as responses, as reason and as name: shown letter by letter, run never, and nothing is asked of elsewhere."""
    prompts = [[{"role": "user", "content": text}, {"role": "assistant", "content": f"{text} 2"}] for text in HOSTILE]
    rows = [{"prompt": p, "responses": [f"{text} A", f"{text} B"]} for p, text in zip(prompts, HOSTILE)]
    served = serve(rows)
    served.desk.title = HOSTILE[1]
    name = "<img src=x onerror=pwned=1>"
    t = tab(served, annotator="%3Cimg%20src%3Dx%20onerror%3Dpwned%3D1%3E")
    t.annotator = name
    tags = "document.querySelectorAll('script, iframe, img, svg, style, link, meta, base, form, a').length"
    before = t.page.evaluate(tags)
    for text in HOSTILE:
        assert sorted(t.shown()) == [f"{text} A", f"{text} B"]
        assert t.page.locator("#prompt .text").all_text_contents() == [text, f"{text} 2"]
        t.page.evaluate(
            "text => { const r = document.getElementById('reason'); r.value = text; draft.reason = text }", text
        )
        t.press("1")
    assert t.page.evaluate(tags) == before and t.page.evaluate("typeof pwned") == "undefined"
    assert t.page.locator("#title").text_content() == HOSTILE[1] and t.page.locator("#people").text_content() == name
    assert [label.reason for label in served.store] == HOSTILE
    t.page.locator("#end-people").click()
    t.page.wait_for_selector("#people-dialog[open]")
    assert t.page.locator("#people-rows td").first.text_content() == name
    t.press("Escape", "u")
    assert t.page.locator("#reason").input_value() == ""
    t.press("[")
    assert t.page.locator("#reason").input_value() == HOSTILE[-2]
    assert t.page.evaluate("typeof pwned") == "undefined"


def test_the_policy_of_the_page_stops_what_would_slip_through(serve, tab):
    """Were there a hole: no inline script, no markup from strings, no picture or connection from elsewhere."""
    t = tab(serve(PAIRS))
    blocked = t.page.evaluate(
        """async () => {
        const tried = {};
        const attempt = async (name, what) => { try { tried[name] = await what() } catch (error) { tried[name] = error.name } };
        await attempt("markup", () => { document.body.innerHTML = "<b>x</b>" });
        await attempt("later", () => { setTimeout("globalThis.pwned = 1", 0) });
        await attempt("fetch", () => fetch("http://127.0.0.1:9/"));
        await attempt("inline", () => { const s = document.createElement("script"); s.textContent = "globalThis.pwned = 1";
          document.body.append(s) });
        await attempt("handler", () => { const b = document.createElement("b"); b.setAttribute("onclick", "globalThis.pwned = 1");
          document.body.append(b); b.click() });
        await new Promise((done) => setTimeout(done, 50));
        return [tried, typeof pwned, document.querySelectorAll("#item").length];
    }"""
    )
    tried, pwned, pages = blocked
    assert pwned == "undefined" and pages == 1
    assert tried["markup"] == "TypeError" and tried["fetch"] == "TypeError"
    assert t.complaints  # the browser said so each time
    t.complaints.clear()
    t.asked.clear()


class Elsewhere(http.server.BaseHTTPRequestHandler):
    page = ""

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(self.page.encode())

    def log_message(self, *_):
        pass


def test_a_page_from_elsewhere_that_even_knows_the_link_gets_nothing_in_or_out(serve, browser):
    """In a real browser, with its cookies and rules: forms, blind requests, reading, frames, scripts from here."""
    served = serve(PAIRS)
    body = '{"annotator": "kim", "item": "%s", "ranks": [1, 2], "done": true, "x": "'
    body = body.replace("%s", served.items[0][0])
    Elsewhere.page = f"""<!doctype html><body><iframe id=frame src="{served.url}?annotator=kim"></iframe>
    <iframe name=sink></iframe><form id=form method=post enctype="text/plain" target=sink action="{served.url}api/label">
    <input name='{body}' value='"}}'></form><script src="{served.url}api/people"></script>
    <script>
    const sent = [];
    const send = async (name, options) => {{
      try {{ const r = await fetch("{served.url}api/label", options); sent.push([name, r.type, await r.text()]) }}
      catch (error) {{ sent.push([name, error.name, ""]) }} }};
    const label = '{body}"}}';
    addEventListener("load", async () => {{
      document.getElementById("form").submit();
      await send("json", {{method: "POST", headers: {{"Content-Type": "application/json"}}, body: label}});
      await send("blind", {{method: "POST", mode: "no-cors", body: label}});
      await send("beacon", {{method: "POST", mode: "no-cors", keepalive: true, body: new Blob([label], {{type: "text/plain"}})}});
      try {{ const r = await fetch("{served.url}api/people"); sent.push(["read", r.type, await r.text()]) }}
      catch (error) {{ sent.push(["read", error.name, ""]) }}
      let inside = "blocked";
      try {{ inside = document.getElementById("frame").contentDocument.body.textContent }} catch {{ }}
      globalThis.found = {{sent, inside}};
    }});
    </script>"""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    context = browser.new_context()
    try:
        page = context.new_page()
        page.goto(f"http://127.0.0.1:{server.server_port}/")
        page.wait_for_function("globalThis.found")
        found = page.evaluate("found")
        frame = page.frames[1]
        assert frame.url.startswith("chrome-error:") or frame.locator("#item").count() == 0
    finally:
        context.close()
        server.shutdown()
        server.server_close()
    assert found["inside"] == "blocked" or "prompt" not in found["inside"]
    assert all(text == "" for _, _, text in found["sent"]), found
    assert {name: kind for name, kind, _ in found["sent"]}["read"] == "TypeError"
    assert list(served.store) == [] and list(Store(served.store.path)) == []


# ---- how it looks and speaks

CONTRAST = """() => {
  const parse = (c) => c.match(/[\\d.]+/g).map(Number);
  const light = (c) => { const [r, g, b] = parse(c).map((v) => (v / 255 <= 0.03928 ? v / 255 / 12.92
    : ((v / 255 + 0.055) / 1.055) ** 2.4)); return 0.2126 * r + 0.7152 * g + 0.0722 * b };
  const behind = (e) => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
    if (parse(c).length === 3 && c !== "rgba(0, 0, 0, 0)") return c } return getComputedStyle(document.body).backgroundColor };
  return [...document.querySelectorAll("button, .text, .hint, .label, legend, .count, .title, .place")]
    .filter((e) => e.checkVisibility() && !e.disabled && e.textContent.trim())
    .map((e) => { const [a, b] = [light(getComputedStyle(e).color), light(behind(e))].sort((x, y) => y - x);
      return [(a + 0.05) / (b + 0.05), e.id || e.className, e.textContent.slice(0, 20)] })
    .filter(([ratio]) => ratio < 4.5);
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 1280])
def test_it_fits_the_screen_and_can_be_read(serve, tab, width, scheme):
    """No sideways scrolling, even with a word of 400 letters; 40 px for fingers; tools in one row; contrast of WCAG AA; three scripts."""
    texts = ["x" * 400, "عاصمة المغرب هي الرباط", "서울에서 부산까지", "plain"]
    served = serve([{"prompt": "ما هي العاصمة؟", "responses": texts}, *PAIRS], safety=True)
    t = tab(served, viewport={"width": width, "height": 800}, color_scheme=scheme)
    for _ in range(2):
        assert t.page.evaluate("document.documentElement.scrollWidth") <= width
        assert t.page.evaluate(CONTRAST) == []
        targets = t.page.locator("#answer button:visible").all()
        assert targets and all(target.bounding_box()["height"] >= 40 for target in targets)
        assert len({round(b.bounding_box()["y"]) for b in t.page.locator(".tools button:visible").all()}) == 1, (
            "one row"
        )
        if t.prompt() != "prompt 0":
            directions = "[...document.querySelectorAll('.card .text')].map((e) => [e.textContent, getComputedStyle(e).direction])"
            assert dict(t.page.evaluate(directions))[texts[1]] == "rtl"
            t.press("a", "b", "c", "d", "Enter")
    background = t.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (int(background[4:].split(",")[0]) < 60) == (scheme == "dark")


def test_everything_has_a_name_and_news_is_spoken(serve, tab):
    t = tab(serve([*PAIRS[:2], *FOUR], safety=True))
    for keys in ([], ["1", "q"] * 2):
        t.press(*keys)
        for control in t.page.locator("button:visible, textarea:visible").all():
            name = control.evaluate("e => e.ariaLabel || e.textContent.trim() || e.labels?.[0]?.textContent.trim()")
            assert name, control.evaluate("e => e.outerHTML")
    assert t.page.locator("#status").get_attribute("aria-live") == "polite"
    assert t.page.locator("#status").text_content() == "Item 3 of 3"
    assert t.page.locator("#fill").get_attribute("aria-valuenow") == "2"
    t.page.keyboard.press("?")
    t.page.wait_for_selector("#help-dialog[open]")
    assert "save and go on" in t.page.locator("#keys").inner_text()
