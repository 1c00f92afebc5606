"""The page at / and what it consists of, without a browser: who gets it, what it may do, what it asks for."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import httpx
import pytest

import k2hybrid
from k2hybrid.server.app import Settings
from k2hybrid.server.openapi_schemas import REPLIES
from k2hybrid.server.page import STATIC_PATHS, prefers_html
from tests.server.conftest import Served, serving
from tests.server.scripted import Script, ScriptedModel

BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,*/*;q=0.8"
FOLDER = Path(k2hybrid.__file__).parent / "server" / "static"
HTML = (FOLDER / "page.html").read_text()
SCRIPT = (FOLDER / "page.js").read_text()
STYLE = (FOLDER / "page.css").read_text()
HOSTILE = "<img src=x onerror=alert(1)>'\"</script><script>alert(2)</script>"


@pytest.fixture(scope="module")
def locked() -> Iterator[Served]:
    with serving(ScriptedModel(Script([])), Settings(name=HOSTILE, api_keys=("key-one",))) as served:
        yield served


def page(served: Served, **headers: str) -> httpx.Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx.get(f"{served.url}/", headers={"accept": BROWSER, **named})


# --- who gets what ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accept", "html"),
    [
        (BROWSER, True),
        ("text/html", True),
        ("TEXT/HTML; charset=utf-8", True),
        ("text/*, application/json;q=0.5", True),
        ("", False),
        ("*/*", False),
        ("application/json", False),
        ("application/json, text/html", False),
        ("application/json, text/html;q=0.9, */*;q=0.1", False),
        ("text/html;q=0", False),
        ("text/html;q=0, */*", False),
        ("text/html;q=none", False),
        (";;;,,q=1,=;", False),
        ("image/png", False),
    ],
)
def test_html_is_for_those_who_prefer_it(server: Served, accept: str, html: bool) -> None:
    assert prefers_html(accept) is html
    answer = httpx.get(f"{server.url}/", headers={"accept": accept})
    assert answer.status_code == 200
    assert answer.headers["content-type"] == ("text/html; charset=utf-8" if html else "application/json")
    assert answer.headers["vary"] == "Accept"
    if not html:
        assert answer.json() == {"name": "k2hybrid", "version": answer.json()["version"], "model": "k2"}


def test_the_page_holds_nothing_of_the_server_and_needs_no_key(server: Served, locked: Served) -> None:
    plain, secret = page(server), page(locked)
    assert plain.status_code == secret.status_code == 200
    assert plain.content == secret.content == (FOLDER / "page.html").read_bytes()
    head = httpx.head(f"{locked.url}/", headers={"accept": BROWSER})
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == str(len(plain.content))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("page.css", "text/css; charset=utf-8"),
        ("page.js", "text/javascript; charset=utf-8"),
        ("icon.svg", "image/svg+xml"),
    ],
)
def test_its_files(locked: Served, name: str, kind: str) -> None:
    answer = httpx.get(f"{locked.url}/static/{name}")
    assert answer.status_code == 200
    assert answer.content == (FOLDER / name).read_bytes()
    assert answer.headers["content-type"] == kind
    assert f"/static/{name}" in STATIC_PATHS


def test_every_file_is_served_and_no_other(server: Served, locked: Served) -> None:
    assert {path.rpartition("/")[2] for path in STATIC_PATHS} | {"page.html"} == {
        path.name for path in FOLDER.iterdir()
    }
    for path in ("/static", "/static/", "/static/page.html", "/static/../page.py", "/static/%2e%2e/page.py"):
        answer = httpx.get(server.url + path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
        assert httpx.get(locked.url + path).status_code == 401  # as any path that does not exist
    assert server.post("/static/page.js").status_code == 405


def test_who_has_a_file_is_not_sent_it_again(server: Served) -> None:
    for path in ("/", *STATIC_PATHS):
        first = httpx.get(server.url + path, headers={"accept": BROWSER})
        tag = first.headers["etag"]
        assert first.headers["cache-control"] == "no-cache"
        for known in (tag, f"W/{tag}", f'"other", {tag}', "*"):
            again = httpx.get(server.url + path, headers={"accept": BROWSER, "if-none-match": known})
            assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
        other = httpx.get(server.url + path, headers={"accept": BROWSER, "if-none-match": '"other"'})
        assert (other.status_code, other.content) == (200, first.content)


# --- what it may do -----------------------------------------------------------------------------------


def test_the_policy_lets_it_have_files_of_this_server_alone(server: Served) -> None:
    for path in ("/", *STATIC_PATHS):
        headers = httpx.get(server.url + path, headers={"accept": BROWSER}).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        policy = dict(
            part.strip().partition(" ")[::2] for part in headers["content-security-policy"].split(";")
        )
        assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
        assert policy["form-action"] == policy["trusted-types"] == "'none'"
        assert policy["require-trusted-types-for"] == "'script'"
        for kind in ("script-src", "style-src", "img-src", "connect-src"):
            assert policy[kind] == "'self'"


def test_a_foreign_page_gets_none_of_it_and_an_allowed_ones_answer_varies(server: Served) -> None:
    for path in ("/", "/status", *STATIC_PATHS):
        assert httpx.get(server.url + path, headers={"origin": "http://evil.example"}).status_code == 403
    with serving(ScriptedModel(Script([])), Settings(origins=("https://app.example",))) as served:
        assert page(served, origin="https://app.example").headers["vary"] == "Accept, Origin"


class Elements(HTMLParser):
    """Every element's name and attributes, and the text within scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.inline = ""
        self._within = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._within = tag
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        self._within = ""

    def handle_data(self, data: str) -> None:
        if self._within in ("script", "style"):
            self.inline += data

    @property
    def ids(self) -> list[str]:
        return [found for _, attrs in self.elements if (found := attrs.get("id"))]


def test_nothing_in_it_breaks_the_policy() -> None:
    found = Elements(HTML)
    assert found.inline.strip() == ""
    for _, attrs in found.elements:
        assert not [name for name in attrs if name == "style" or name.startswith("on")]
        for name in ("src", "href", "action"):
            assert "//" not in (attrs.get(name) or "")
    assert not re.search(r"url\(|@import|//", re.sub(r"/\*.*?\*/", "", STYLE, flags=re.DOTALL))


def test_what_comes_from_elsewhere_can_only_become_text() -> None:
    sinks = (
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|Function\(|DOMParser|srcdoc|\.style\b"
    )
    assert not re.search(sinks, SCRIPT)
    assert not re.search(r"localStorage|document\.cookie", SCRIPT)  # where a key would outlive the tab
    assert set(re.findall(r"\.(?:href|src) = ", SCRIPT)) == set()


def test_a_hostile_name_is_data(locked: Served) -> None:
    headers = {"authorization": "Bearer key-one"}
    answer = httpx.get(f"{locked.url}/status", headers=headers)
    assert answer.headers["content-type"] == "application/json"
    assert answer.json()["server"]["model"] == HOSTILE
    assert httpx.get(f"{locked.url}/").json()["model"] == HOSTILE


# --- whether it fits together -------------------------------------------------------------------------


def test_script_and_page_name_the_same_elements() -> None:
    ids = Elements(HTML).ids
    assert len(ids) == len(set(ids))
    used = set(re.findall(r"""\b(?:at|show)\(\s*"([a-z-]+)",?""", SCRIPT)) | set(
        re.findall(r"#([a-z][a-z-]*)", "".join(re.findall(r'reveal\("([^"]*)"', SCRIPT)))
    )
    labels = set(re.findall(r'(?:aria-labelledby|for)="([a-z-]+)"', HTML))
    assert used | labels == set(ids)
    selectors = "".join(re.findall(r'(?:reveal|querySelectorAll)\("([^"]*)"', SCRIPT))
    styled = {"row", "notice", "now"}
    classes = set(re.findall(r"\.([a-z]+)", selectors)) | styled
    assert classes == set(" ".join(re.findall(r'class="([^"]*)"', HTML)).split())
    assert styled <= set(re.findall(r"\.([a-z]+)", STYLE))


def test_the_script_asks_for_described_figures_alone() -> None:
    parts = REPLIES["Status"]["properties"]
    used = re.findall(r"\b(server|engine|latents|experts|device|weights|memory|journal)\.(\w+)", SCRIPT)
    used += [
        ("experts", name) for name in re.findall(r"(\w+):", *re.findall(r"const \{(.*)\} = experts", SCRIPT))
    ]
    assert {part for part, _ in used} == set(parts)
    assert [(part, name) for part, name in used if name not in parts[part]["properties"]] == []


def test_links_lead_somewhere(server: Served) -> None:
    links = {attrs["href"] for tag, attrs in Elements(HTML).elements if tag in ("a", "link")}
    assert links >= {"status", "metrics", "health", "v1/models", "openapi.json"}
    for link in links:
        assert httpx.get(f"{server.url}/{link}").status_code == 200
