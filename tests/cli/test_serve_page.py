"""The chat page in a headless Chromium: streaming, stopping, keys, settings, hostile text."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from qwen2kit.backend.registry import installed
from tests.serving import Server
from tests.tiny_checkpoint import write_tiny_checkpoint

pytest.importorskip("fastapi")
webdriver = pytest.importorskip("selenium.webdriver")

from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no chromium with its driver"),
]
KEY = "page-key"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    if not installed():
        pytest.skip("no backend installed")
    path = tmp_path_factory.mktemp("models") / "tiny-page"
    write_tiny_checkpoint(path, max_position_embeddings=8192)
    with Server(path, "--slots", "2", key=KEY) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


class Page:
    """The page as a person uses it."""

    def __init__(self, browser: Any, server: Server) -> None:
        self.browser = browser
        self.server = server
        browser.get(server.url)
        browser.execute_script("localStorage.clear(); sessionStorage.clear()")
        browser.get(server.url)

    def __getitem__(self, name: str) -> Any:
        return self.browser.find_element(By.ID, name)

    def until(self, condition: Any) -> None:
        self.server.wait_for(condition, seconds=30)

    def texts(self, kind: str) -> list[str]:
        found = self.browser.find_elements(By.CSS_SELECTOR, f".{kind} .body")
        return [node.get_property("textContent") for node in found]

    def notes(self) -> list[str]:
        found = self.browser.find_elements(By.CSS_SELECTOR, ".meta span")
        return [node.text for node in found]

    def set(self, name: str, value: str) -> None:
        """Put a value into a setting, as typing or dragging would."""
        self.browser.execute_script(
            "const node = document.getElementById(arguments[0]); node.value = arguments[1];"
            "for (const kind of ['input', 'change'])"
            "  node.dispatchEvent(new Event(kind, { bubbles: true }));",
            name, value,
        )  # fmt: skip

    def say(self, *keys: str) -> None:
        self["input"].send_keys(*keys)


@pytest.fixture
def page(browser: Any, server: Server) -> Page:
    page = Page(browser, server)
    page.until(lambda: "API key" in page["title"].text)  # and the settings are open
    page.set("key", KEY)
    page.until(lambda: page["title"].text == "tiny-page")
    browser.get_log("browser")
    return page


def test_an_answer_streams_and_is_counted(page: Page) -> None:
    page.set("limit", "40")
    page.say("the cat", Keys.SHIFT + Keys.ENTER, Keys.NULL, "sat", Keys.ENTER)
    assert page.texts("user") == ["the cat\nsat"]
    page.until(lambda: len(page.notes()) == 1)
    assert page.notes()[0].startswith("40 tokens")
    assert "cut off" in page.notes()[0]
    assert page.texts("assistant")[0]
    assert page["input"].get_property("value") == ""
    page.say("more", Keys.ENTER)
    page.until(lambda: len(page.notes()) == 2)
    assert page.browser.execute_script("return turns.map((turn) => turn.role)") == [
        "user", "assistant", "user", "assistant",
    ]  # fmt: skip
    assert page.browser.get_log("browser") == []


@pytest.mark.parametrize("how", ["escape", "button", "new"])
def test_stopping_frees_the_slot(page: Page, how: str) -> None:
    page.set("temperature", "0")  # drawn at random, an answer may end before it is stopped
    page.say("go on", Keys.ENTER)
    page.until(lambda: any(page.texts("assistant")))
    assert page["send"].text == "Stop"
    if how == "escape":
        page.say(Keys.ESCAPE)
    else:
        page["send" if how == "button" else "new"].click()
    page.until(lambda: page["send"].text == "Send")
    page.until(lambda: page.server.metric("qwen2kit_running") == 0)
    if how == "new":
        assert page.texts("user") == page.texts("assistant") == []
        assert page.browser.execute_script("return turns.length") == 0
    else:
        assert page.notes() == ["stopped"]


def test_try_again_replaces_the_answer(page: Page) -> None:
    page.set("limit", "5")
    page.set("temperature", "2")
    page.say("a", Keys.ENTER)
    page.until(lambda: len(page.notes()) == 1)
    first = page.texts("assistant")
    page.browser.find_element(By.CSS_SELECTOR, "[data-copy=retry]").click()
    page.until(lambda: page.notes() and page.texts("assistant") != first)
    assert len(page.texts("assistant")) == 1
    assert page.browser.execute_script("return turns.length") <= 2


def test_settings_reach_the_request_and_stay(page: Page) -> None:
    page.set("system", "be kind")
    page.set("temperature", "0.25")
    assert page["shown"].text == "0.25"
    body = page.browser.execute_script(
        "turns = [{ role: 'user', content: 'x' }]; return JSON.parse(requestBody())"
    )
    assert body["messages"][0] == {"role": "system", "content": "be kind"}
    assert body["temperature"] == 0.25
    assert "max_tokens" not in body
    page.browser.refresh()
    assert page["system"].get_property("value") == "be kind"
    assert KEY not in page.browser.execute_script("return JSON.stringify(localStorage)")


def test_an_error_is_shown_in_words(page: Page) -> None:
    page.set("limit", "999999")
    page.say("hi", Keys.ENTER)
    page.until(lambda: len(page.notes()) == 1)
    assert "the context holds 8192 tokens" in page.notes()[0]


HOSTILE = """<img src=x onerror="document.title='owned'"> <script>document.title='owned'</script>
[a](javascript:document.title='owned') [b](https://example.org/"onmouseover="alert(1))
```html
<script>document.title='owned'</script>
```
| <b>x</b> | y |
|---|---|
| `<i>` | **<u>z</u>** |"""


def test_text_never_becomes_markup(page: Page) -> None:
    tags = page.browser.execute_script(
        "const box = document.createElement('div'); document.body.append(box);"
        "box.replaceChildren(...markdown(arguments[0]));"
        "return [...box.querySelectorAll('*')].map((node) => [node.tagName, node.attributes.length,"
        " node.getAttribute('href')])",
        HOSTILE,
    )
    names = {name for name, _, _ in tags}
    assert names <= {"P", "BR", "A", "PRE", "CODE", "BUTTON", "DIV", "TABLE", "TR", "TH", "TD",
                     "STRONG"}  # fmt: skip
    assert all(link is None or link.startswith("https://") for _, _, link in tags)
    page.set("limit", "1")
    page.say("<img src=x onerror=\"document.title='owned'\">", Keys.ENTER)
    page.until(lambda: len(page.notes()) == 1)
    assert page.texts("user") == ["<img src=x onerror=\"document.title='owned'\">"]
    assert page.browser.title == "tiny-page · qwen2kit"


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("a **b** *c* `d*e*` ~~f~~",
         "<p>a <strong>b</strong> <em>c</em> <code>d*e*</code> <s>f</s></p>"),
        ("# One\n## Two #\ntext", "<h2>One</h2><h3>Two</h3><p>text</p>"),
        ("- a\n  - b\n- c", "<ul><li>a<ul><li>b</li></ul></li><li>c</li></ul>"),
        ("3. x\n4. y", '<ol start="3"><li>x</li><li>y</li></ol>'),
        ("1 < 2 && 3 > 2", "<p>1 &lt; 2 &amp;&amp; 3 &gt; 2</p>"),
        ("2 * 3 * 4 and snake_case_name", "<p>2 * 3 * 4 and snake_case_name</p>"),
        ("> a\n> b\n\nc", "<blockquote>a\nb</blockquote><p>c</p>"),
    ],
)  # fmt: skip
def test_markdown(page: Page, text: str, html: str) -> None:
    assert html == page.browser.execute_script(
        "const box = document.createElement('div'); box.replaceChildren(...markdown(arguments[0]));"
        "return box.innerHTML",
        text,
    )


def test_unfinished_code_streams_as_code(page: Page) -> None:
    text = page.browser.execute_script(
        "return markdown('say\\n```py\\nx = 1\\n\\ny')[1].querySelector('code').textContent"
    )
    assert text == "x = 1\n\ny"


@pytest.mark.parametrize(("width", "height"), [(360, 640), (1280, 800)])
def test_it_fits_the_screen(page: Page, width: int, height: int) -> None:
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    page.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        page.browser.execute_script(
            "addMessage('user', 'x'.repeat(300)); const node = addMessage('assistant');"
            "show(node, '```\\n' + 'y'.repeat(500) + '\\n```\\n' + 'z'.repeat(300));"
            "finish(node, '12 tokens, 3.4 per second, first after 0.10 s', false)"
        )
        root = "document.documentElement"
        for where in (root, "scroller"):
            wide, inner = page.browser.execute_script(
                f"return [{where}.scrollWidth, {where}.clientWidth]"
            )
            assert wide <= inner
        box = page["send"].rect
        assert box["y"] + box["height"] <= height
        assert box["x"] + box["width"] <= width
    finally:
        page.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast(page: Page, scheme: str) -> None:
    """WCAG 2.1's ratio, 4.5 for text, of every pair of text and ground that the page uses."""
    feature = [{"name": "prefers-color-scheme", "value": scheme}]
    page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": feature})
    colours = page.browser.execute_script(
        "const style = getComputedStyle(document.documentElement);"
        "return Object.fromEntries(['bg', 'raised', 'text', 'muted', 'user', 'accent', 'on-accent',"
        " 'code', 'bad'].map((name) => [name, style.getPropertyValue('--' + name).trim()]))"
    )
    page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    pairs = [("text", ground) for ground in ("bg", "raised", "user", "code")]
    pairs += [("muted", "bg"), ("muted", "raised"), ("accent", "bg"), ("bad", "bg")]
    for ink, ground in [*pairs, ("on-accent", "accent")]:
        assert _contrast(colours[ink], colours[ground]) >= 4.5, (ink, ground)
    assert (_luminance(colours["bg"]) < 0.5) == (scheme == "dark")


def _luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(one: str, other: str) -> float:
    high, low = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)
