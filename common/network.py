"""Is a server there? Asked once, answered within seconds, whatever the network does."""

import functools
import threading


@functools.cache
def answers(url: str, seconds: float) -> bool:
    """Does an HTTP server at `url` answer at all (any status, proxies respected) within `seconds`?

    The answer is kept for the life of the process: a training asks once, not once a run.
    """
    found: list[bool] = []

    def ask() -> None:
        import requests

        try:
            requests.head(url, timeout=seconds, allow_redirects=False).close()
            found.append(True)
        except (requests.RequestException, OSError, ValueError):
            found.append(False)

    # a thread, because the time limit of a socket does not bound the name lookup
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(found and found[0])
