"""The page of the maintenance game: what its file holds, what a browser makes of it.

The second half needs playwright, which the extra `dev` installs, and a Chromium, which
it does not.
"""

import base64
import json
import re
import shutil
import zlib

import numpy as np
import pytest

from experiments import maintenance_page

PRICES = {"profit": 250, "maintenance": 10_000, "failure": 60_000}
RULES = {"maintenance_down": 20, "failure_down": 60, "interval": 193, "threshold": 10}
LABELS = {
    "corrective": "run to failure",
    "preventive": "fixed interval",
    "isolated": "predictive, each airline alone",
    "federated": "predictive, federated",
    "pooled": "predictive, pooled",
}
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
    None,
)


def strategy_of(name, lives, every, frames, nodes, slots):
    """A fleet whose engines live as long as told, taken out before or never."""
    rng = np.random.default_rng(len(name))
    left = {"corrective": 0, "isolated": 45, "federated": 14, "pooled": 12}
    seats = range(nodes * slots)
    engine, age, down = [0] * len(seats), [0] * len(seats), [0] * len(seats)
    state = np.zeros((frames, len(seats)), np.uint8)
    counts, ages = np.zeros((frames, 3), int), np.zeros_like(state)
    flown = maintained = failed = 0
    for t in range(frames * every):
        for i in seats:
            life = lives[i, engine[i]]
            remaining = life - age[i]
            out = age[i] >= 193 if name == "preventive" else remaining <= left[name]
            if down[i]:
                down[i] -= 1
            elif remaining <= 0:
                failed, down[i] = failed + 1, 60
                engine[i], age[i] = engine[i] + 1, 0
            elif out and (name != "isolated" or rng.random() < 0.06):
                maintained, down[i] = maintained + 1, 20
                engine[i], age[i] = engine[i] + 1, 0
            else:
                flown, age[i] = flown + 1, age[i] + 1
            if t % every == every - 1:
                soon = name in ("isolated", "federated", "pooled") and remaining < 30
                state[t // every, i] = soon if not down[i] else 2 + (down[i] > 20)
                ages[t // every, i] = age[i] // 2
        counts[t // every] = flown, maintained, failed
    hours = len(seats) * every * np.arange(1, frames + 1)
    money = counts @ [250, -10_000, -60_000] / hours
    band = {"low": (money - 5).tolist(), "high": (money + 5).tolist()}
    text = {"state": state, "age": ages}
    keys = ("flown", "maintained", "failed")
    return (
        {"name": name, "label": LABELS[name], "band": band}
        | dict(zip(keys, counts.T.tolist(), strict=True))
        | {k: base64.b64encode(v.tobytes()).decode() for k, v in text.items()}
    )


def game_of(nodes=3, slots=4, frames=40, every=25):
    """A game as `write` takes it; engines live 130 to 360 cycles."""
    rng = np.random.default_rng(0)
    lives = rng.integers(130, 360, (nodes * slots, frames * every // 100 + 2))
    return {
        "title": "A game </script><script>document.title='broken'</script> & <b>",
        "prices": PRICES | RULES,
        "times": [every * (t + 1) for t in range(frames)],
        "strategies": [
            strategy_of(name, lives, every, frames, nodes, slots) for name in LABELS
        ],
        "nodes": nodes,
        "slots": slots,
    }


def money(game, name, frame, **prices):
    """Dollars per engine-hour."""
    prices = PRICES | prices
    strategy = next(s for s in game["strategies"] if s["name"] == name)
    total = prices["profit"] * strategy["flown"][frame]
    total -= prices["maintenance"] * strategy["maintained"][frame]
    total -= prices["failure"] * strategy["failed"][frame]
    return total / (game["nodes"] * game["slots"] * game["times"][frame])


@pytest.fixture(scope="module")
def game():
    return game_of()


@pytest.fixture(scope="module")
def path(game, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "game.html"
    maintenance_page.write(path, game)
    return path


def stored(path):
    found = re.findall(
        r'<script type="application/json" id="game">(.*?)</script>', path
    )
    assert len(found) == 1
    return json.loads(found[0])


def test_file_needs_nothing_else(path):
    page = path.read_text("utf-8")
    assert not re.search(
        r"https?:|//[a-z]|@import|\bimport\b|fetch|XMLHttp|url\(", page
    )
    assert set(re.findall(r"(?:src|href)=(\S*)", page)) == {'"data:,">'}
    assert [file.name for file in path.parent.iterdir()] == ["game.html"]


def test_file_holds_the_game(path, game):
    read = stored(path.read_text("utf-8"))
    assert read.keys() == game.keys()
    for mine, theirs in zip(read["strategies"], game["strategies"], strict=True):
        for key in ("state", "age"):
            changes = zlib.decompress(base64.b64decode(mine.pop(key)))
            changes = np.frombuffer(changes, np.uint8).reshape(40, 12)
            frames = np.cumsum(changes, axis=0, dtype=np.uint8)
            assert frames.tobytes() == base64.b64decode(theirs[key])
        assert mine == {k: theirs[k] for k in mine}
    assert {k: read[k] for k in read if k != "strategies"} == {
        k: game[k] for k in game if k != "strategies"
    }


def test_text_cannot_leave_its_element(path):
    page = path.read_text("utf-8")
    assert page.count("</script>") == 2 and page.count("<script") == 2


def test_large_games_stay_small(tmp_path):
    """300 frames of 80 airlines; a copy of what comes in would take 1.3 MB."""
    rng = np.random.default_rng(0)
    life = rng.integers(130, 360, 320)
    cycle = (10 * np.arange(300)[:, None] + rng.integers(0, 360, 320)) % life
    state = 1 * (cycle > life - 30) + (cycle < 20)
    frames = {"age": cycle // 2, "state": state}
    rising = np.cumsum(rng.integers(1000, 3000, 300)).tolist()
    strategy = {k: rising for k in ("flown", "maintained", "failed")}
    strategy |= {
        "label": "a",
        "band": {k: rng.normal(size=300) for k in ("low", "high")},
    }
    for key, values in frames.items():
        strategy[key] = base64.b64encode(values.astype(np.uint8).tobytes()).decode()
    game = game_of(1, 1, 2) | {"nodes": 80, "slots": 4, "times": rising}
    game["strategies"] = [strategy | {"name": name} for name in LABELS]
    maintenance_page.write(tmp_path / "large.html", game)
    assert (tmp_path / "large.html").stat().st_size < 500_000


def test_arrays_are_taken_too(game, path, tmp_path):
    first = game["strategies"][0]
    arrays = first | {k: np.array(first[k]) for k in ("flown", "maintained", "failed")}
    arrays |= {"band": {k: np.array(v) for k, v in first["band"].items()}}
    again = game | {"strategies": [arrays, *game["strategies"][1:]]}
    again |= {"nodes": np.int32(3), "times": np.array(game["times"])}
    maintenance_page.write(tmp_path / "again.html", again)
    assert (tmp_path / "again.html").read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"flown": [1, 2]}, r"flown of 'corrective' must be \[40\].*\(2,\)"),
        ({"band": {"low": [0] * 40, "high": [0]}}, "band.high of 'corrective'"),
        ({"age": ""}, r"age of 'corrective' must be \[40, 12\], got 0 bytes"),
        ({"failed": [float("nan")] * 40}, "not JSON compliant"),
    ],
)
def test_games_that_do_not_fit_are_refused(game, tmp_path, change, message):
    bad = game | {"strategies": [game["strategies"][0] | change]}
    with pytest.raises(ValueError, match=message):
        maintenance_page.write(tmp_path / "bad.html", bad)
    assert not list(tmp_path.iterdir())


def test_times_must_rise(game, tmp_path):
    with pytest.raises(ValueError, match="times must rise"):
        maintenance_page.write(tmp_path / "x.html", game | {"times": [0] * 40})


# ---- in a browser --------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip(
        "playwright.sync_api", reason="needs playwright: pip install playwright"
    )
    if CHROMIUM is None:
        pytest.skip("needs a Chromium: apt install chromium")
    with api.sync_playwright() as playwright:
        # Root may not use the sandbox, and containers have a small /dev/shm.
        options = ["--no-sandbox", "--disable-dev-shm-usage"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, path):
    """Opens the page offline; at the end, nothing must have gone wrong in it."""
    wrong, opened = [], []

    def open_page(width=1280, scheme="light"):
        context = browser.new_context(
            viewport={"width": width, "height": 800}, color_scheme=scheme, offline=True
        )
        opened.append(context)
        page = context.new_page()
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("requestfailed", lambda request: wrong.append(request.url))
        page.goto(path.as_uri())
        page.wait_for_selector("main:not([aria-busy])", timeout=20_000)
        return page

    yield open_page
    for context in opened:
        context.close()
    assert wrong == []


def standings(page):
    """What the table says: the strategies in order, and their numbers."""
    rows = page.locator("#standings tr").evaluate_all(
        "rows => rows.map(r => [r.dataset.name, ...[...r.cells].map(c => c.innerText)])"
    )
    number = {name: [_number(x) for x in cells] for name, _, *cells in rows}
    return list(number), number


def _number(text):
    return float(re.sub(r"[$,]", "", text).replace("\N{MINUS SIGN}", "-"))


def picture(canvas):
    return canvas.evaluate("canvas => canvas.toDataURL()")


def expected(game, frame, **prices):
    numbers = {}
    for s in game["strategies"]:
        per_hour = money(game, s["name"], frame, **prices)
        counts = [s[key][frame] for key in ("failed", "maintained", "flown")]
        numbers[s["name"]] = [pytest.approx(per_hour, abs=0.0051), *counts]
    order = sorted(LABELS, key=lambda name: -money(game, name, frame, **prices))
    return order, numbers


def test_slider_and_keys_move_the_numbers(open_page, game):
    page = open_page()
    assert page.title() == game["title"] == page.inner_text("h1")
    assert standings(page) == expected(game, 39)
    slider = page.locator("#time")
    slider.focus()
    page.keyboard.press("Home")
    assert standings(page) == expected(game, 0)
    for frame in 1, 2, 3:
        page.keyboard.press("ArrowRight")
        assert standings(page) == expected(game, frame)
    page.locator("h1").click()  # away from the slider the arrows work too
    slider.blur()
    page.keyboard.press("ArrowLeft")
    assert standings(page) == expected(game, 2)
    assert page.inner_text("#clock").split() == ["75", "h", "of", "1,000", "h"]
    box = page.locator("#race").bounding_box()
    assert box
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + 50)
    assert 5 < int(slider.input_value()) < 35


def test_prices_change_who_wins(open_page, game):
    page = open_page()
    order = expected(game, 39)[0]
    assert order[0] != "corrective"
    assert LABELS[order[0]] in page.inner_text("#headline")
    band = page.locator("#race-caption")
    before = picture(page.locator("#race"))
    assert "standard deviation" in band.inner_text()

    page.fill("#failure", "900")
    page.fill("#maintenance", "25000")
    prices = {"failure": 900, "maintenance": 25_000}
    assert standings(page) == expected(game, 39, **prices)
    assert standings(page)[0][0] == "corrective"
    assert "“run to failure” makes the most" in page.inner_text("#headline")
    assert "stated prices only" in band.inner_text()
    assert picture(page.locator("#race")) != before

    page.fill("#failure", "")  # no number: the last one stays
    assert standings(page) == expected(game, 39, **prices)
    assert page.get_attribute("#failure", "aria-invalid") == "true"
    page.click("#reset")
    assert standings(page) == expected(game, 39)
    assert picture(page.locator("#race")) == before
    page.check("[value=total]")
    assert picture(page.locator("#race")) != before
    total = money(game, "corrective", 39) * 12 * 1000
    label = (page.get_attribute("#race", "aria-label") or "").replace(",", "")
    assert f"run to failure: ${total:.2f}".replace("$-", "\N{MINUS SIGN}$") in label


def test_bands_are_drawn_at_the_stated_prices_only(open_page):
    page = open_page()
    race = page.locator("#race")
    widen = "s => s.band.low = s.band.low.map((x, i) => i % 2 ? x : 0)"
    for profit, drawn in ("250", True), ("251", False):
        page.fill("#profit", profit)
        before = picture(race)
        page.evaluate(f"game.strategies.forEach({widen}); draw()")
        assert (picture(race) != before) == drawn
        page.reload()
        page.wait_for_selector("main:not([aria-busy])")


def test_play_advances_to_the_end(open_page, game):
    page = open_page()
    page.select_option("#speed", "10")
    page.locator("h1").click()
    page.keyboard.press("Space")  # at the end, so from the start
    assert "Pause" in page.inner_text("#play")
    page.wait_for_function("document.getElementById('time').value > 0")
    page.click("#play")
    assert "Play" in page.inner_text("#play")
    frame = int(page.input_value("#time"))
    assert 0 < frame < 39
    assert standings(page) == expected(game, frame)
    page.select_option("#speed", "60")
    page.click("#play")
    page.wait_for_function("document.getElementById('time').value == 39")
    page.wait_for_function("document.getElementById('play').innerText.includes('Play')")


def test_fleet_shows_the_strategy_that_is_picked(open_page, game):
    page = open_page()
    fleet = page.locator("#fleets figure").first
    pictures = set()
    for i, s in enumerate(game["strategies"]):
        fleet.locator("select").select_option(str(i))
        states = np.frombuffer(base64.b64decode(s["state"]), np.uint8)[-12:]
        counts = np.bincount(states, minlength=4)
        assert [int(n) for n in fleet.locator("b").all_inner_texts()] == list(counts)
        assert f"{counts[0]} flying" in (
            fleet.locator(".grid").get_attribute("aria-label") or ""
        )
        pictures.add(picture(fleet.locator(".grid")))
    assert len(pictures) > 3
    fleet.locator(".grid").hover(position={"x": 3, "y": 3})
    assert fleet.locator(".engine").inner_text().startswith("Airline 1, engine 1: ")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [380, 1280])
def test_fits_the_window(open_page, width, scheme):
    page = open_page(width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    beyond = page.evaluate(
        "[...document.querySelectorAll('.card')].flatMap(card => {"
        "  const right = card.getBoundingClientRect().right - 12;"
        "  return [...card.querySelectorAll('*')].filter("
        "    e => e.getBoundingClientRect().right > right).map(e => e.outerHTML)})"
    )
    assert beyond == [], "wider than its card"
    for canvas in page.locator("canvas").all():
        colours = canvas.evaluate(
            "c => new Set(new Uint32Array(c.getContext('2d')"
            ".getImageData(0, 0, c.width, c.height).data.buffer)).size"
        )
        assert colours > 2, "drawn"
    unnamed = page.evaluate(
        "[...document.querySelectorAll('input, select, button, canvas')].filter("
        "e => !(e.labels?.length || e.ariaLabel || e.innerText || e.ariaHidden)).length"
    )
    assert unnamed == 0
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(18, 22, 28)") == (scheme == "dark")
