"""The page at /raee: who gets it, with which headers, and what it tells of the server."""

import asyncio
import re
from argparse import ArgumentParser

import httpx
import pytest

from raee_serve.server import access
from raee_serve.server.access import Access
from raee_serve.server.page import FILES
from tests.unit.serving import NUM_LAYERS, TASK, Server

pytestmark = pytest.mark.unit

DATA = "/v1/raee/page"
HTML = FILES["/raee"].read_text()
SCRIPTS = {path: file.read_text() for path, file in FILES.items() if file.suffix == ".js"}


def get(server, path, root_path=""):
    async def send():
        transport = httpx.ASGITransport(server.app, root_path=root_path)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.get(root_path + path)

    return asyncio.run(send())


def type_of(answer):
    return answer.headers["content-type"].split(";")[0]


@pytest.mark.parametrize("path", FILES)
def test_every_file_is_served_under_a_strict_policy(path):
    answer = get(Server(), path)
    assert answer.status_code == 200 and answer.content == FILES[path].read_bytes()
    policy = answer.headers["content-security-policy"].split("; ")
    assert "default-src 'none'" in policy and "script-src 'self'" in policy
    assert "require-trusted-types-for 'script'" in policy
    assert not re.search(r"unsafe|https?:|\*", answer.headers["content-security-policy"])
    assert answer.headers["x-content-type-options"] == "nosniff"
    types = {".css": "text/css", ".html": "text/html", ".js": "text/javascript"}
    assert type_of(answer) == types.get(FILES[path].suffix, "image/svg+xml")


def test_all_that_the_page_names_is_there_and_nothing_else():
    named = {f"/{path}" for path in re.findall(r'(?:src|href)="([^"]*)"', HTML)}
    for script in SCRIPTS.values():
        named |= {f"/raee/{name}" for name in re.findall(r'from "\./([^"]*)"', script)}
    assert named | {"/raee"} == set(FILES)


def test_what_the_policy_forbids_is_not_in_the_files():
    assert not re.search(r"<script>|<style|\son\w+=|\sstyle=|https?:", HTML)
    for script in SCRIPTS.values():
        assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", script)
        assert "localStorage" not in script


def test_the_page_is_open_and_its_data_is_guarded():
    server = Server(api_key="secret")
    assert get(server, "/raee").status_code == get(server, "/raee/main.js").status_code == 200
    assert get(server, DATA).status_code == 401
    key = {"authorization": "Bearer secret"}
    assert server.post(DATA, method="GET", headers=key).status_code == 200


def test_it_can_be_switched_off():
    server = Server(access=Access(frozenset({"page"})))
    for path in ("/raee", "/raee/", "/raee/main.js", DATA):
        answer = get(server, path)
        assert answer.status_code == 404
        assert answer.json()["error"]["type"] == "NotFoundError"
    assert server.post("/v1/raee/preview", prompt="a").status_code == 200


def test_the_switch_is_a_flag_and_is_told_at_start_up():
    parser = ArgumentParser()
    access.add_arguments(parser)
    told = str(Access.of(parser.parse_args([])))
    assert told == "explain on, preview on, reload on, page on"
    assert not Access.of(parser.parse_args(["--disable-page"])).allows("page")


@pytest.mark.parametrize(
    "path", ["/raee/nothing.js", "/raee/index.html", "/raee/../page.py", "/raee/%2e%2e/page.py"]
)
def test_another_file_is_a_404(path):
    assert get(Server(), path).status_code == 404


def test_another_method_is_a_405():
    for path, allowed in (("/raee", "GET, HEAD"), ("/raee/main.js", "GET, HEAD"), (DATA, "GET")):
        answer = Server().post(path, prompt="a")
        assert (answer.status_code, answer.headers["allow"]) == (405, allowed)
    assert Server().post("/raee", method="HEAD").status_code == 200


def test_paths_that_only_begin_alike_are_not_the_pages():
    assert get(Server(), "/raeex").text == "Not Found"  # the application's own answer


def test_it_works_behind_a_prefix():
    answer = get(Server(), "/raee", root_path="/models/a")
    assert answer.status_code == 200
    answer = get(Server(), "/raee/", root_path="/models/a")
    assert answer.status_code == 307 and answer.headers["location"] == "../raee"
    addresses = re.findall(r'(?:src|href)="([^"]*)"', HTML) + re.findall(
        r'(?:get|post)\w+\(\s*"([^"]*)"', "".join(SCRIPTS.values())
    )
    assert {"v1/models", "v1/raee/page", "v1/raee/preview", "metrics"} <= set(addresses)
    assert not any(address.startswith("/") for address in addresses)


def test_the_data_is_what_the_form_needs():
    answer = Server(access=Access(frozenset({"explain"}))).post(DATA, method="GET")
    assert answer.json() == {
        "object": "raee.page",
        "num_layers": NUM_LAYERS,
        "has_chat_template": False,
        "explain": False,
        "preview": True,
        "tasks": [
            {
                "name": TASK.name,
                "kind": "labels",
                "labels": ["terrible", "great"],
                "head": "probe",
                "rows": 8,
                "endpoint": "completions",
                "template": "{text} It was",
            }
        ],
    }


def test_without_a_table_there_are_no_tasks():
    assert Server(fixed_layer=7).post(DATA, method="GET").json()["tasks"] == []
