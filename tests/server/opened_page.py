"""The server's page in a browser: what a person sees there and does."""

from __future__ import annotations

import time

from .browser import show_as

SECONDS = 30


class Page:
    """Opened anew, as large as a desk's screen, by day."""

    def __init__(self, driver, url: str):
        self.driver = driver
        show_as(driver, 1200, 800, "light")
        driver.get("about:blank")
        self.console()  # what another page has left
        driver.get(url)
        self.wait(lambda: self.js("return document.getElementById('model').value") or self.is_shown("#key-form"))

    def js(self, script: str, *arguments):
        return self.driver.execute_script(script, *arguments)

    def js_async(self, script: str, *arguments):
        """done(value) ends it."""
        return self.driver.execute_async_script(f"const done = arguments[arguments.length - 1]; {script}", *arguments)

    def wait(self, condition):
        """→ its first true value"""
        end = time.monotonic() + SECONDS
        while not (found := condition()):
            assert time.monotonic() < end, f"{self.text('body')}\n{self.console()}"
            time.sleep(0.01)
        return found

    def find(self, selector: str):
        return self.driver.find_element("css selector", selector)

    def is_shown(self, selector: str) -> bool:
        return self.find(selector).is_displayed()

    def text(self, selector: str) -> str:
        """Of the last one there is."""
        return self.js("return [...document.querySelectorAll(arguments[0])].at(-1)?.textContent ?? ''", selector)

    def set(self, selector: str, value: str) -> None:
        field = self.find(selector)
        field.clear()
        field.send_keys(value)

    def settings(self, **values: str) -> None:
        self.js("document.getElementById('settings').open = true")
        for name, value in values.items():
            self.set(f"#{name.replace('_', '-')}", value)

    def ask(self, question: str) -> None:
        self.set("#question", question)
        self.find("#send").click()

    def answer(self) -> str:
        """The last one, when it has ended."""
        self.wait(lambda: not self.find("#stop").is_enabled())
        return self.text(".answer")

    def rows(self) -> list[list[str]]:
        return self.js(
            "const { rows } = document.getElementById('requests');"
            "return [...rows].map(({ cells }) => [...cells].map((cell) => cell.textContent))"
        )

    def console(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser")]
