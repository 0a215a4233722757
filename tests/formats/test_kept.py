"""What was made last stays for whoever asks next; the rest is made again."""

from __future__ import annotations

import threading

from deltamerge.tensors.reader import RecentParts


def test_the_keys_last_asked_for_stay() -> None:
    kept, made = RecentParts(2), list[str]()

    def make(key: str) -> str:
        return kept.get(key, lambda: made.append(key) or key.upper())  # type: ignore[func-returns-value]

    assert kept.known("a") is None
    assert [make(key) for key in "aab"] == ["A", "A", "B"]
    assert kept.known("a") == "A"  # which is now the later of the two
    make("c")
    assert (kept.known("a"), kept.known("b"), kept.known("c")) == ("A", None, "C")
    make("b")
    assert made == ["a", "b", "c", "b"]


def test_what_is_being_made_is_not_known_yet_and_is_made_once() -> None:
    kept, begun, go, made = RecentParts(2), threading.Event(), threading.Event(), list[int]()

    def slow() -> int:
        begun.set()
        assert go.wait(10)
        made.append(1)
        return 7

    threads = [threading.Thread(target=lambda: kept.get("a", slow)) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert begun.wait(10)
    assert kept.known("a") is None
    go.set()
    for thread in threads:
        thread.join()
    assert (kept.known("a"), made) == (7, [1])
