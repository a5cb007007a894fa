"""The demo for programs: `gradio_client` against the running server, and what its guard refuses."""

import httpx
import pytest


@pytest.fixture(scope="module")
def client(demo):
    from gradio_client import Client

    client = Client(demo.url, verbose=False)
    yield client
    client.close()


def file(path):
    from gradio_client import handle_file

    return handle_file(path)


def test_a_question(client, demo, sample):
    said = client.predict(media=[file(sample)], question="What makes the sound?", api_name="/ask")
    (answer,) = said["answers"]
    assert answer["parsed"] == [{"type": "choice", "value": "electric guitar"}] and said["media"] == [
        "sample.mp4"
    ]
    assert said["first_token_s"] > 0 and said["engine"]["name"] == "onnxruntime"
    left = [path.name for path in demo.store.root.rglob("*") if path.is_file()]
    assert left == ["lock"]


def test_all_tasks_share_one_prefix(client, sample):
    said = client.predict(media=[file(sample)], api_name="/ask")
    assert {"ave", "avvp", "avcap"} <= {answer["task"] for answer in said["answers"]}
    new = [answer for answer in said["answers"] if not answer["timings"]["cached_tokens"]]
    assert len(new) <= 1
    assert sum(answer["timings"]["decode_s"] > 0.05 for answer in said["answers"]) <= 1


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({"task": "arig"}, "task arig needs"),
        ({"task": "dance"}, "unknown task 'dance'"),
        ({"task": "avqa"}, "needs a question"),
    ],
)
def test_errors_are_readable(client, sample, request_, words):
    with pytest.raises(Exception, match=words):
        client.predict(media=[file(sample)], **request_, api_name="/ask")


@pytest.mark.parametrize("meta", [{"meta": {"_type": "gradio.FileData"}}, {}])
def test_a_file_that_was_not_uploaded_is_not_opened(demo, sample, meta):
    event = post(demo, "call/ask", {"data": [[{"path": str(sample), **meta}], "", "ave"]}).json()["event_id"]
    said = httpx.get(f"{demo.url}gradio_api/call/ask/{event}", timeout=30).text
    # With Gradio's own mark Gradio refuses it, without the mark we do.
    assert said.startswith("event: error")
    assert "was not uploaded" in said if meta else "only uploaded files" in said


def test_nothing_is_fetched_for_a_client(demo, connected):
    data = {"path": "http://192.0.2.1/x.mp4", "meta": {"_type": "gradio.FileData"}}
    assert post(demo, "run/ask", {"data": [[data], "", "ave"]}).status_code == 403
    assert httpx.get(f"{demo.url}gradio_api/file=http://192.0.2.1/x").status_code == 403
    assert httpx.get(f"{demo.url}gradio_api/proxy=http://192.0.2.1/x").status_code == 404
    assert "192.0.2.1" not in connected


@pytest.mark.parametrize("path", ["/etc/passwd", "{root}/lock", "{root}/visitors/../lock"])
def test_no_other_file_is_served(demo, path):
    path = path.format(root=demo.store.root)
    assert httpx.get(f"{demo.url}gradio_api/file={path}").status_code in (403, 404)


def test_limits_and_foreign_names(demo):
    big = {"files": ("big.mp4", b"\0" * 6_000_000)}
    refused = httpx.post(f"{demo.url}gradio_api/upload", files=big)
    assert refused.status_code == 413 and "at most 5" in refused.text
    assert httpx.get(demo.url, headers={"host": "evil.example"}).status_code == 421
    home = httpx.get(demo.url)
    assert "default-src 'self'" in home.headers["content-security-policy"]
    assert httpx.get(f"{demo.url}monitoring").status_code == 404


def post(demo, route, body):
    return httpx.post(f"{demo.url}gradio_api/{route}", json=body, timeout=30)
