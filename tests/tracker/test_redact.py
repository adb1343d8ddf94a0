"""No secret leaves the process in a config tree."""

from sdtrain.tracker.redact import REDACTED, without_secrets


def test_secrets_go_by_key_and_by_value_and_the_rest_stays(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefgh12345")
    monkeypatch.setenv("MY_KEY", "1")  # too short to be one; it stands in every number
    tree = {
        "tracker": {"api_key": "abc", "mode": "auto"},
        "data": {"url": "https://user:hf_abcdefgh12345@host/x", "shards": ["a", "hf_abcdefgh12345"]},
        "conditioner": {"tokenizer": "shapes", "max_tokens": 77, "num_keys": 1, "password": "p"},
        "seed": 1,
        "name": "run1",
    }
    assert without_secrets(tree) == {
        "tracker": {"api_key": REDACTED, "mode": "auto"},
        "data": {"url": f"https://user:{REDACTED}@host/x", "shards": ["a", REDACTED]},
        "conditioner": {"tokenizer": "shapes", "max_tokens": 77, "num_keys": 1, "password": REDACTED},
        "seed": 1,
        "name": "run1",
    }
    assert tree["tracker"]["api_key"] == "abc"
