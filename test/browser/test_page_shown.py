"""The page in a real browser, over groups that are made up."""

from __future__ import annotations

import httpx
import pytest
from chromium import Page
from fake_server import FakeGroups, FakeServer
from server import free_port

LIVE = "document.querySelector('#connection').innerText === 'live'"
HOSTILE = "<img src=x onerror='window.taken=1'><script>window.taken=1</script>\"'&"


def show(page: Page, server: FakeServer) -> None:
    page.go(f"{server.url}/kevlar")
    page.wait(LIVE)


def test_a_failover_from_loss_to_return(page: Page) -> None:
    groups = FakeGroups()
    with FakeServer(groups, free_port()) as server:
        show(page, server)
        assert page.text("#tiles").startswith("groups that serve\n2 of 2")
        assert page.js("document.querySelector('#failovers').hidden")
        groups.lose()
        page.wait("document.querySelector('#groups tbody tr td').innerText === 'starting'")
        assert "1 of 2" in page.text("#tiles") and page.js("document.title").startswith("1 of 2 - ")
        row = page.text("#failovers tbody tr")
        assert "rank0 killed by SIGKILL" in row and "1,500" in row and row.endswith("not yet")
        assert "Group 0 was lost" in page.text("#news") and "3 moved" in page.text("#news")
        page.js("document.querySelector('.mark').click()")
        assert "computed again\n42 tokens" in page.text("#detail")
        groups.come_back()
        page.wait("document.querySelector('#groups tbody tr td').innerText === 'ready'")
        assert page.text("#failovers tbody tr").rstrip().endswith(" s")
        assert page.js(
            "[...document.querySelectorAll('.row:first-child .span')].map((e) => e.className.split(' ')[1])"
        ) == [
            "ready",
            "down",
            "starting",
            "ready",
        ]
        assert page.js("document.querySelectorAll('#first polyline, #inter polyline').length") >= 5


def test_what_others_name_is_text(page: Page) -> None:
    groups = FakeGroups(cause=HOSTILE, name=HOSTILE)
    with FakeServer(groups, free_port()) as server:
        show(page, server)
        groups.lose()
        page.wait("document.querySelector('.mark') !== null")
        page.js("document.querySelector('.mark').click()")
        page.wait("!document.querySelector('#detail').hidden")
        assert page.text("#detail h3").endswith(HOSTILE)
        assert HOSTILE in page.text("#groups tbody th") and HOSTILE in page.text("#failovers")
        assert page.js("[window.taken ?? null, document.querySelectorAll('main img, main script').length]") == [None, 0]


def test_the_key_is_asked_for_and_never_in_an_address(page: Page) -> None:
    with FakeServer(FakeGroups(), free_port(), api_key="right one") as server:
        assert httpx.get(f"{server.url}/kevlar/status").status_code == 401
        assert httpx.get(f"{server.url}/kevlar/history").status_code == 401
        page.go(f"{server.url}/kevlar/")
        page.wait("!document.querySelector('#key').hidden")
        assert page.js("document.querySelectorAll('#groups tr').length") == 0
        for key in ("wrong", "right one"):
            page.js("document.querySelector('#key-input').value = arguments[0]", key)
            page.js("document.querySelector('#key button').click()")
            if key == "wrong":
                page.wait("document.querySelector('#key-problem').innerText.includes('does not accept')")
        page.wait(LIVE)
        page.wait("document.querySelector('#key').hidden")
        asked = page.js("[location.href, ...performance.getEntriesByType('resource').map((one) => one.name)]")
        assert not any("right" in url for url in asked)
        stored = page.js("[localStorage.length, sessionStorage.length, document.cookie]")
        assert stored == [0, 0, ""]


def test_a_server_that_is_gone_is_said_and_comes_back(page: Page) -> None:
    port = free_port()
    with FakeServer(FakeGroups(), port) as server:
        show(page, server)
    page.wait("document.querySelector('#connection').innerText.startsWith('server not answering since ')")
    assert "2 of 2" in page.text("#tiles"), "what was known last is not shown any more"
    assert "not answering" in page.js("document.title")
    again = FakeGroups()
    again.lose()
    with FakeServer(again, port):
        page.wait(LIVE)
        assert page.js("document.title").startswith("1 of 2")


@pytest.mark.parametrize("dark", [False, True])
def test_a_telephone_shows_it_without_scrolling_sideways(page: Page, dark: bool) -> None:
    groups = FakeGroups(cause="x" * 300)
    groups.lose()
    with FakeServer(groups, free_port()) as server:
        page.size(400, 800)
        page.dark(dark)
        show(page, server)
        page.js("document.querySelector('.mark').click()")
        assert page.js("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
        back = page.js("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, back.removeprefix("rgb(").removesuffix(")").split(","))) < 150) == dark


def test_tables_and_controls_have_names(page: Page) -> None:
    groups = FakeGroups()
    groups.lose()
    with FakeServer(groups, free_port()) as server:
        show(page, server)
        nameless = page.js(
            "[...document.querySelectorAll('button, input, [role=img], [role=region], table')].filter((e) =>"
            " !(e.innerText || e.ariaLabel || e.getAttribute('aria-labelledby') || e.labels?.length || e.caption))"
            ".map((e) => e.outerHTML)"
        )
        assert nameless == []
        assert page.js("[...document.querySelectorAll('thead th')].every((e) => e.scope === 'col')")
        assert page.js("[...document.querySelectorAll('tbody tr')].every((e) => e.cells[0].scope === 'row')")


def test_the_page_asks_nobody_else() -> None:
    with FakeServer(FakeGroups(), free_port(), api_key="k") as server:
        answer = httpx.get(f"{server.url}/kevlar/")
        assert answer.status_code == 200 and "http" not in answer.text, "an address of another server"
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        for name in ("page.js", "page.css", "icon.svg"):
            file = httpx.get(f"{server.url}/kevlar/{name}")
            assert file.status_code == 200
            unchanged = httpx.get(f"{server.url}/kevlar/{name}", headers={"if-none-match": file.headers["etag"]})
            assert unchanged.status_code == 304 and not unchanged.content
        # Only what is in the list: everything else is the app's, and behind its key.
        for path in ("/kevlar/__init__.py", "/kevlar/../status", "/kevlar/%2e%2e/main.py", "/kevlar//page.js"):
            assert httpx.get(server.url + path).status_code in (401, 404), path
        assert httpx.post(f"{server.url}/kevlar/").status_code == 401
