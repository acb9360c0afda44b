import pytest

from megatron_vespo.config import ServerSection
from megatron_vespo.errors import UserError
from megatron_vespo.rollout.keys import headers, is_loopback, server_key


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_a_server_on_the_loopback_needs_no_key(host: str) -> None:
    assert is_loopback(host) and server_key(ServerSection(host=host)) is None


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.5", "node7", "localhost.evil.org"])
def test_one_that_others_reach_gets_a_new_key(host: str) -> None:
    key = server_key(ServerSection(host=host))
    assert key is not None and len(key) >= 40 and key != server_key(ServerSection(host=host))


def test_a_key_of_yours_comes_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MY_KEY", raising=False)
    for section in (ServerSection(url="http://node7:1", api_key_env="MY_KEY"), ServerSection(api_key_env="MY_KEY")):
        with pytest.raises(UserError, match=r"rollout\.server\.api_key_env: the environment variable MY_KEY"):
            server_key(section)
    monkeypatch.setenv("MY_KEY", "abc")
    assert server_key(ServerSection(url="http://node7:1", api_key_env="MY_KEY")) == "abc"
    assert server_key(ServerSection(host="0.0.0.0", api_key_env="MY_KEY")) == "abc"
    assert server_key(ServerSection(url="http://node7:1")) is None
    assert headers("abc") == {"Authorization": "Bearer abc"} and headers(None) == {}
