"""GET /models, /user/balance and /health."""

from qiusuo.server.money import amount
from tests.server.api.conftest import Place, told


def key(place: Place, **limits) -> dict[str, str]:
    return {"authorization": f"Bearer {place.house.keys.make('a key', **limits)[1]}"}


def test_models_in_the_shape_of_openai(place: Place) -> None:
    listed = told(place.get("/v1/models"))
    assert listed["object"] == "list"
    [model] = listed["data"]
    assert model == {
        "id": "talker",
        "object": "model",
        "created": place.house.registry.get("talker").created,
        "owned_by": "qiusuo",
    }
    assert told(place.get("/models/talker")) == model
    assert place.get("/v1/models/nobody").status_code == 404


def test_a_key_sees_what_it_may_use(place: Place) -> None:
    headers = key(place, models=("another",))
    assert told(place.get("/v1/models", **headers))["data"] == []
    assert place.get("/v1/models/talker", **headers).status_code == 404


def test_a_balance_in_strings(place: Place) -> None:
    headers = key(place)
    nothing = told(place.get("/user/balance", **headers))
    assert nothing["is_available"] is False
    place.house.ledger.top_up("main", amount("100"), token="paid")
    place.house.ledger.top_up("main", amount("10"), granted=True, token="given")
    assert told(place.get("/user/balance", **headers)) == {
        "is_available": True,
        "balance_infos": [
            {
                "currency": "CNY",
                "total_balance": "110.00",
                "granted_balance": "10.00",
                "topped_up_balance": "100.00",
            }
        ],
    }


def test_whoever_sits_here_needs_no_money(place: Place) -> None:
    assert told(place.get("/user/balance"))["is_available"] is True


def test_metrics_tell_of_an_engine_that_does_not_run(place: Place) -> None:
    assert 'qiusuo_engine_up{model="talker"} 1.0' in place.get("/metrics").text
    place.house.registry.get("talker").engine.stop()
    metrics = place.get("/metrics").text
    assert 'qiusuo_engine_up{model="talker"} 0.0' in metrics
    assert 'qiusuo_engine_running{model="talker"}' not in metrics


def test_health_needs_no_key(place: Place) -> None:
    key(place)
    assert told(place.get("/health")) == {"status": "ok", "models": ["talker"], "loading": []}
    assert place.get("/v1/models").status_code == 401
