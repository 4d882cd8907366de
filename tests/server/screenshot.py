"""The README's picture of the page: python -m tests.server.screenshot docs/page.png"""

from __future__ import annotations

import argparse
import threading
from contextlib import suppress
from pathlib import Path

import httpx
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

from .browser import chromium, show_as
from .served_process import ServedProcess

QUESTION = "What does a GPU do? Answer in two sentences."
OTHERS = [f"Tell me a story about {subject}." for subject in ("a lighthouse", "bread", "the planets", "a bear", "ice")]
SYSTEM = "You are a helpful assistant who answers at length, step by step, with examples, and never in a hurry. "


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path)
    parser.add_argument("--width", type=int, default=1200)
    parser.add_argument("--height", type=int, default=800)
    parser.add_argument("--scheme", choices=("light", "dark"), default="light")
    parser.add_argument("--open", action="store_true", help="unfold what is folded")
    options = parser.parse_args()
    flags = ["--block-size", "16", "--max-model-len", "1024", "--max-num-seqs", "8", "--quiet"]
    server = ServedProcess("smollm2", *flags)
    try:
        with chromium() as driver:
            show_as(driver, options.width, options.height, options.scheme)
            driver.get(server.url)
            ask(driver, QUESTION)
            complete(server.url, "Hello", 1)  # the others share what it leaves in the cache
            others = [threading.Thread(target=complete, args=(server.url, text, 600)) for text in OTHERS]
            for thread in others:
                thread.start()
            ask(driver, "And what is a kernel?", wait=False)
            WebDriverWait(driver, 60).until(lambda d: "tokens/s" in d.find_elements(By.CLASS_NAME, "facts")[-1].text)
            if options.open:
                driver.execute_script("document.querySelectorAll('details').forEach((node) => (node.open = true))")
            driver.execute_async_script("setTimeout(arguments[0], 2500)")  # the window that rates are taken over
            driver.save_screenshot(str(options.path))
    finally:
        server.kill()
    for thread in others:
        thread.join()


def ask(driver, text: str, *, wait: bool = True) -> None:
    driver.find_element(By.ID, "question").send_keys(text)
    driver.find_element(By.ID, "send").click()
    if wait:
        WebDriverWait(driver, 120).until(lambda d: not d.find_element(By.ID, "stop").is_enabled())


def complete(url: str, text: str, max_tokens: int) -> None:
    messages = [{"role": "system", "content": SYSTEM * 4}, {"role": "user", "content": text}]
    with suppress(httpx.HTTPError):  # the server ends before the answer
        httpx.post(f"{url}/v1/chat/completions", json={"messages": messages, "max_tokens": max_tokens}, timeout=300)


if __name__ == "__main__":
    main()
