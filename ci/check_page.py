"""The page of `ttt serve` in a real browser: upload a document, watch it being learned, ask, fork, rename, reload, chat.

    apt-get install chromium && pip install playwright
    python ci/check_page.py target/release/ttt runs/tiny [FOLDER FOR SCREENSHOTS]
"""

import pathlib
import shutil
import sys
import tempfile

from playwright.sync_api import expect, sync_playwright

from server import serving

BOOK = "".join(f"{i} green bottles hanging on the wall, and if one should fall\n" for i in range(400))


def main(ttt, model, screenshots=None):
    with tempfile.TemporaryDirectory() as place, sync_playwright() as playwright:
        place = pathlib.Path(place)
        shots = pathlib.Path(screenshots) if screenshots else place
        shots.mkdir(exist_ok=True)
        (place / "bottles.txt").write_text(BOOK)
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        with serving(ttt, model, store=place) as (url, _):
            page = browser.new_page(viewport={"width": 1100, "height": 800}, color_scheme="light")
            problems, elsewhere = [], []
            page.on("console", lambda m: problems.append(m.text) if m.type in ("error", "warning") else None)
            page.on("pageerror", lambda e: problems.append(str(e)))
            page.on("request", lambda r: elsewhere.append(r.url) if not r.url.startswith((url, "data:", "blob:")) else None)
            page.goto(url)
            expect(page.locator("#about")).to_contain_text("parameters")

            # A continuation, and what was likely at a token.
            page.fill("#prompt", "fn main() {")
            page.fill("#max-tokens", "40")
            page.fill("#seed", "1")
            page.press("#prompt", "Control+Enter")
            expect(page.locator("#usage")).to_contain_text("remembered")
            tokens = page.locator("#output .token")
            assert tokens.count() == 40, tokens.count()
            tokens.nth(5).hover()
            expect(page.locator("#likely .chosen")).to_have_count(1)
            assert page.locator("#likely div").count() >= 5
            page.screenshot(path=shots / "complete.png")
            page.focus("#output")
            page.keyboard.press("ArrowRight")
            expect(page.locator("#output .token.at")).to_have_count(1)
            page.keyboard.press("Escape")
            expect(page.locator("#likely")).to_be_hidden()

            # A document: choose, watch, ask.
            page.get_by_role("tab", name="Learn").click()
            page.set_input_files("#file", place / "bottles.txt")
            page.click("#learn-go")
            expect(page.locator("#plots svg").first).to_be_visible()
            expect(page.locator("#learned")).to_contain_text("learned", timeout=60_000)
            layers = page.locator("#plots > div").count()
            assert layers >= 2, layers
            for line in page.locator("#plots polyline").all():
                assert len(line.get_attribute("points").split()) > 3
            losses = page.locator("#plots output").first.inner_text().split(" → ")
            assert float(losses[1]) < float(losses[0]), losses
            page.screenshot(path=shots / "learn.png", full_page=True)
            page.get_by_role("button", name="Ask it").click()
            assert page.locator("#complete-start option:checked").inner_text() == "bottles.txt"
            page.fill("#prompt", "400 green")
            page.click("#go")
            expect(page.locator("#usage")).to_contain_text("remembered")
            page.click("#keep")
            page.fill("#ask-input", "after the question")
            page.keyboard.press("Enter")
            expect(page.locator("#usage")).to_contain_text("kept as after the question")

            # The shelf: fork, rename, download, reload, delete.
            page.get_by_role("tab", name="States").click()
            expect(page.locator("#states li")).to_have_count(2)
            page.get_by_role("button", name="Fork bottles.txt").click()
            page.fill("#ask-input", "copy")
            page.keyboard.press("Enter")
            expect(page.locator("#states li")).to_have_count(3)
            page.get_by_role("button", name="Rename copy").click()
            page.fill("#ask-input", "<b>second</b>")
            page.keyboard.press("Enter")
            expect(page.get_by_role("heading", name="<b>second</b>")).to_be_visible()
            with page.expect_download() as download:
                page.get_by_role("button", name="Download bottles.txt").click()
            saved = place / "downloaded.state"
            download.value.save_as(saved)
            page.set_input_files("#upload", saved)
            expect(page.get_by_role("heading", name="downloaded.state")).to_be_visible()
            page.reload()
            expect(page.locator("#states li")).to_have_count(4)
            page.screenshot(path=shots / "states.png", full_page=True)
            page.once("dialog", lambda dialog: dialog.accept())
            page.get_by_role("button", name="Delete downloaded.state").click()
            expect(page.locator("#states li")).to_have_count(3)

            # A conversation behind a state, in the dark, on a phone, by keyboard alone.
            page.set_viewport_size({"width": 390, "height": 760})
            page.click("#theme")
            assert page.evaluate("document.documentElement.dataset.theme") == "dark"
            page.get_by_role("tab", name="States").focus()
            page.keyboard.press("ArrowRight")
            page.keyboard.press("ArrowRight")
            expect(page.locator("#chat")).to_be_visible()
            page.select_option("#chat-start", label="bottles.txt")
            page.focus("#say")
            page.keyboard.type("7 green bottles")
            page.keyboard.press("Enter")
            expect(page.locator("#messages li.assistant")).not_to_be_empty(timeout=30_000)
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "it scrolls sideways"
            page.screenshot(path=shots / "phone.png")
            page.click("#chat-undo")
            expect(page.locator("#messages li")).to_have_count(0)
            page.get_by_role("tab", name="Learn").click()
            page.fill("#text", "x")
            for box in page.locator("#learn *:visible").all():
                edges = box.bounding_box()
                assert edges["x"] + edges["width"] <= 390, "something reaches beyond the phone"
            page.locator("#learn-go").scroll_into_view_if_needed()
            page.screenshot(path=shots / "phone-learn.png")

            # What the server refuses is said.
            page.get_by_role("tab", name="Complete").click()
            page.fill("#prompt", "")
            page.evaluate("document.getElementById('max-tokens').value = 100000")
            page.click("#go")
            expect(page.locator("#error")).to_contain_text("max_tokens")
            assert not elsewhere, f"the page spoke to {elsewhere}"
            # The refusal above is the one thing that the browser's console may complain of.
            assert all("400" in problem for problem in problems), problems
        browser.close()
    print("the page works in Chromium")


if __name__ == "__main__":
    main(*sys.argv[1:])
