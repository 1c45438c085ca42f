"""Nothing that is sent to the routes that admission reads makes it fail.

RAEE_FUZZ sets the number of requests: 10,000 for a long run.
"""

import json
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.serving import Server

pytestmark = pytest.mark.unit

REQUESTS = int(os.environ.get("RAEE_FUZZ", "300"))
OURS = ("preview", "reload", "classify")
POSTED = ("/v1/completions", "/v1/chat/completions", *(f"/v1/raee/{name}" for name in OURS))
ROUTES = (
    *(("POST", path) for path in POSTED),
    ("GET", "/v1/raee/page"),
    ("GET", "/v1/raee/tasks"),
)

texts = st.text(st.characters(codec=None), max_size=20) | st.sampled_from(
    ["film It was", " It was", "\ud800 It was", "\x00", "sst2", "probe", "full", "auto"]
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=10,
)
options = st.dictionaries(
    st.sampled_from(["exit_layer", "task", "k", "head", "budget", "off", "explain"]) | texts,
    values | st.integers(1, 30) | st.just(True) | st.sampled_from(["sst2", "probe", "full"]),
    max_size=4,
)
prompts = texts | st.lists(texts, max_size=4) | st.lists(st.integers(0, 10**12), max_size=4)
messages = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "system"]), "content": texts | values}),
    max_size=3,
)
limits = st.sampled_from(
    [
        {},
        {"allowed_token_ids": [10, 11]},
        {"structured_outputs": {"choice": [" great", "terrible"]}},
        {"structured_outputs": {"choice": ["great"] * 3}},
    ]
)
bodies = st.builds(
    lambda *parts: {key: value for part in parts for key, value in part.items()},
    st.fixed_dictionaries({}, optional={"raee": options | values}),
    st.fixed_dictionaries({}, optional={"prompt": prompts | values, "stream": st.booleans()}),
    st.fixed_dictionaries({}, optional={"messages": messages | values}),
    st.fixed_dictionaries({}, optional={"input": prompts | values, "task": st.just("sst2")}),
    limits,
    st.dictionaries(st.sampled_from(["model", "logit_bias", "tools", "max_tokens"]), values),
)
nests = st.integers(1, 2000).map(lambda n: b'{"prompt": "a It was", "x": ' + b"[" * n + b"]" * n)
raw_bodies = (
    bodies.map(lambda body: json.dumps(body).encode())
    | st.binary(max_size=50)
    | nests.map(lambda raw: raw + b"}")
    | st.sampled_from([b'{"raee": {"k": 1e999}}', b'{"raee": {"k": NaN}}', b'{"raee": 1e4}'])
)


@pytest.fixture(scope="module")
def server():
    return Server(sample_full=0.5, seed=0, min_layer=2)


@settings(
    max_examples=REQUESTS,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(route=st.sampled_from(ROUTES), raw=raw_bodies)
def test_no_body_is_the_servers_fault(server, route, raw):
    method, path = route
    headers = {"content-type": "application/json"}
    answer = server.post(path, content=raw, headers=headers, method=method)
    assert answer.status_code < 500, answer.content
    told = answer.content.decode()
    assert "Traceback" not in told and 'File "' not in told
    if answer.headers["content-type"] == "application/json":
        json.loads(told)
