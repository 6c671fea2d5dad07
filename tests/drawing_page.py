"""A browser with the page of a drawing, for tests: what a person does there, and sees. Needs selenium."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.actions.wheel_input import ScrollOrigin
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait


class Page:
    """What a person does with the page and sees of it."""

    def __init__(self, driver: Any, path: Path | None = None) -> None:
        self.driver = driver
        if path is not None:
            driver.get(path.as_uri())
        self.until(lambda: self.all("[data-ready]"))
        if path is not None:
            self.keys("f")

    def until(self, done: Any) -> Any:
        return WebDriverWait(self.driver, 20, 0.02).until(lambda _: done())

    def all(self, css: str) -> list[Any]:
        return self.driver.find_elements(By.CSS_SELECTOR, css)

    def keys(self, *keys: str) -> None:
        ActionChains(self.driver).send_keys(*keys).perform()

    def press(self, name: str) -> None:
        next(b for b in self.all(".sqd-bar button") if name in (b.text, b.get_attribute("aria-label"))).click()

    def labels(self, css: str = "[data-node]") -> list[str]:
        return [str(b.get_attribute("aria-label")).partition(",")[0] for b in self.all(css)]

    def box(self, label: str, css: str = "[data-node]") -> Any:
        return next(b for b in self.all(css) if str(b.get_attribute("aria-label")).startswith(label))

    def view(self, pane: int = 0) -> list[float]:
        return [float(x) for x in self.all(".sqd-canvas svg")[pane].get_dom_attribute("viewBox").split()]

    def wheel(self, by: int) -> None:
        canvas = ScrollOrigin.from_element(self.all(".sqd-canvas")[0])
        ActionChains(self.driver).scroll_from_origin(canvas, 0, by).perform()

    def look_for(self, text: str) -> None:
        """Writes over what is in the search field."""
        keys = ActionChains(self.driver).key_down(Keys.CONTROL).send_keys("a").key_up(Keys.CONTROL)
        keys.send_keys(text, Keys.ENTER).perform()

    def details(self) -> str:
        return str(self.all(".sqd-details")[0].text)

    def seen(self, box: Any) -> bool:
        """Whether a box is inside the first drawing's pane."""
        return bool(
            self.driver.execute_script(
                "const b = arguments[0].getBoundingClientRect(), c = arguments[0].closest('.sqd-canvas').getBoundingClientRect();"
                "return b.left >= c.left && b.top >= c.top && b.right <= c.right && b.bottom <= c.bottom;",
                box,
            )
        )


# The smallest contrast of a text with the box that it stands on.
CONTRAST = """
const light = c => { const [r, g, b] = c.match(/[\\d.]+/g).map(x => x / 255).map(x => x <= .03928 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4);
  return .2126 * r + .7152 * g + .0722 * b; };
const ratio = (a, b) => (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
return Math.min(...[...document.querySelectorAll(".sqd-canvas [data-node] text")].filter(t => getComputedStyle(t).display !== "none").map(t => {
  const behind = t.previousElementSibling.matches(".chip") ? t.previousElementSibling : t.parentNode.querySelector(".box");
  return ratio(light(getComputedStyle(t).fill), light(getComputedStyle(behind).fill));
}));
"""
