"""Every error's status and body, as clients of DeepSeek and of Anthropic know them."""

import json

import pytest

from qiusuo.server.api.errors import ApiError
from qiusuo.server.money import UNITS
from qiusuo.server.prices import Price
from tests.server.api.conftest import Place, told
from tests.server.api.talkers import HELLO

ASKED = {"model": "talker", "messages": HELLO, "temperature": 0, "max_tokens": 4}
PATH = "/v1/chat/completions"


def error(message: str, kind: str = "invalid_request_error") -> dict:
    inner = {"message": message, "type": kind, "param": None, "code": "invalid_request_error"}
    return {"error": inner}


def bearer(secret: str) -> dict[str, str]:
    return {"authorization": f"Bearer {secret}"}


def rich(place: Place, name: str = "key", **limits) -> dict[str, str]:
    place.house.ledger.top_up("main", 100 * UNITS, token=f"test {name}")
    return bearer(place.house.keys.make(name, **limits)[1])


@pytest.mark.parametrize("body", ["", "{", "[1,", "nonsense"])
def test_400_for_what_is_no_json(place: Place, body: str) -> None:
    response = place.post(PATH, body)
    assert response.status_code == 400
    said = response.json()["error"]
    assert said["code"] == "invalid_request_error"
    assert said["message"].startswith("Failed to parse the request body as JSON: ")


def test_400_for_json_that_is_not_called_json(place: Place) -> None:
    async def visit(client):
        headers = {"content-type": "text/plain"}
        return await client.post(PATH, content=json.dumps(ASKED), headers=headers)

    response = place.visit(visit)
    assert response.status_code == 400
    assert "application/json" in response.json()["error"]["message"]


def test_400_for_a_value_out_of_range(place: Place) -> None:
    response = place.post(PATH, ASKED | {"temperature": 3})
    words = "Invalid temperature value, the valid range of temperature is [0, 2]"
    assert (response.status_code, response.json()) == (400, error(words))


def test_422_for_a_wrong_type_with_its_place(place: Place) -> None:
    messages = [{"role": "user", "content": 3}]
    response = place.post(PATH, ASKED | {"messages": messages})
    assert response.status_code == 422
    said = response.json()["error"]
    begins = "Failed to deserialize the JSON body into the target type: messages[0].content"
    assert said["message"].startswith(begins)
    assert (said["type"], said["param"]) == ("invalid_request_error", None)


def test_401_without_a_key_and_with_a_wrong_one(place: Place) -> None:
    rich(place)
    for headers in ({}, bearer("sk-wrong")):
        response = place.post(PATH, ASKED, **headers)
        assert response.status_code == 401
        said = response.json()["error"]
        assert said["type"] == "authentication_error"
        assert said["code"] == "invalid_request_error"
        assert "sk-wrong" not in said["message"]


def test_402_without_money(place: Place) -> None:
    place.house.prices.set("talker", Price(hit=20, miss=1000, output=4000))
    headers = bearer(place.house.keys.make("poor")[1])
    response = place.post(PATH, ASKED, **headers)
    assert response.status_code == 402
    assert response.json() == error("Insufficient Balance", "unknown_error")


def test_429_with_the_time_to_wait(place: Place) -> None:
    headers = rich(place, rpm=1)
    told(place.post(PATH, ASKED, **headers))
    response = place.post(PATH, ASKED, **headers)
    assert response.status_code == 429
    assert int(response.headers["retry-after"]) >= 1
    said = response.json()["error"]
    assert (said["type"], said["code"]) == ("rate_limit_error", "invalid_request_error")


def test_503_while_shutting_down(place: Place) -> None:
    place.house.desk.closing = True
    response = place.post(PATH, ASKED)
    assert response.status_code == 503
    assert response.json()["error"]["type"] == "service_unavailable_error"
    assert place.get("/health").status_code == 503


def test_503_when_the_engine_has_stopped(place: Place) -> None:
    place.house.registry.get("talker").engine.stop()
    response = place.post(PATH, ASKED)
    assert response.status_code == 503


def test_404_and_405_speak_the_same_way(place: Place) -> None:
    missing, wrong = place.get("/v1/nothing"), place.get(PATH)
    assert (missing.status_code, wrong.status_code) == (404, 405)
    for response in (missing, wrong):
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_500_tells_nothing_of_the_inside(place: Place) -> None:
    @place.app.get("/broken")
    async def broken() -> None:
        raise ZeroDivisionError("a secret")

    response = place.get("/broken")
    assert response.status_code == 500
    assert "secret" not in response.text
    assert response.json()["error"]["type"] == "internal_error"
    assert response.headers["x-content-type-options"] == "nosniff"
    counted = place.get("/metrics").text
    assert 'qiusuo_requests_total{path="/broken",status="500"} 1.0' in counted


@pytest.mark.parametrize("headers", [{"host": "["}, {"origin": "http://["}], ids=str)
def test_403_for_what_is_no_address(place: Place, headers: dict) -> None:
    for response in (
        place.get("/v1/models", **headers),
        place.post("/anthropic/v1/messages", ASKED, **headers),
    ):
        assert response.status_code == 403
        assert "message" in response.json()["error"]


def test_413_has_the_shape_of_its_api(place: Place) -> None:
    body = "x" * (place.house.settings.most_body + 1)
    assert place.post(PATH, body).json()["error"]["type"] == "invalid_request_error"
    assert place.post("/anthropic/v1/messages", body).json()["type"] == "error"


def test_lone_surrogates_break_nothing(place: Place) -> None:
    for field in ("model", "user", "stop"):
        body = json.dumps(ASKED | {field: "\ud800"})
        assert place.post(PATH, body).status_code in (200, 400)
    body = json.dumps(ASKED | {"messages": [{"role": "user", "content": "a\ud800"}]})
    assert place.post(PATH, body).status_code in (200, 400)


def test_an_anthropic_error_has_anthropics_shape() -> None:
    refusal = ApiError(402, "no money")
    assert refusal.anthropic_body == {
        "type": "error",
        "error": {"type": "billing_error", "message": "no money"},
    }


def test_retry_after_is_whole_seconds_and_at_least_one() -> None:
    assert ApiError(429, "x", retry_after=0.01).headers == {"Retry-After": "1"}
    assert ApiError(429, "x", retry_after=2.1).headers == {"Retry-After": "3"}
    assert ApiError(429, "x").headers == {}
