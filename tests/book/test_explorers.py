"""The explorers' mathematics in a real browser, against the package; and the explorers themselves.

Without a browser these tests are skipped, and with CI=true they fail.
"""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Browser, Page

from qstar import gaussian, log_geometric_mean, solve_kl_symmetry
from qstar.adapters.checkpoints import log_distributions
from qstar.decoding import costs
from qstar.gaussian import Gaussian
from qstar.rows import acceptance_probability, kl
from qstar.sampling.enumeration import (
    block_distribution,
    joint_distribution,
    patched_loop,
    pick_distribution,
    token_distribution,
)
from qstar.sampling.picks import accept_or_redraw, draw_candidates, source_loop
from qstar.sampling.rules import verify
from qstar.theory.acceptance import source_loop_distribution
from qstar_book.numbers import read_expected
from qstar_book.presets import preset_pair
from qstar_book.sphinx.explorer_data import EXPLORERS, MEASURED
from qstar_book.sphinx.explorers import markup

ROOT = Path(__file__).resolve().parents[2]
STATIC = ROOT / "book" / "_static"
PARENTS = costs.PARENTS
data_of = functools.cache(lambda name: EXPLORERS[name].data(ROOT))
CLOSE = 1e-9


@pytest.fixture(scope="module")
def core(browser: Browser) -> Page:
    """A page with nothing in it but the mathematics."""
    page = browser.new_page()
    page.add_script_tag(path=STATIC / "qstar-core.js")
    return page


def worst(found: Any, expected: Any) -> float:
    """The largest difference; equal infinities have none."""
    found, expected = np.asarray(found, dtype=float), np.asarray(expected, dtype=float)
    assert found.shape == expected.shape
    with np.errstate(invalid="ignore"):
        gaps = np.where(found == expected, 0.0, np.abs(found - expected))
    return float(np.nan_to_num(gaps, nan=np.inf).max())


# --- Gaussians -----------------------------------------------------------------------------------

GAUSSIANS = r"""
(pairs) => pairs.map(([policy, teacher, alpha]) => {
  const found = qstarCore.solveGaussians(policy, teacher);
  const q = qstarCore.geometricMean(policy, teacher, found.alpha);
  return [
    found.alpha, found.chernoff, found.klPolicyTeacher, found.klTeacherPolicy,
    ...qstarCore.klToParents(found.axes, found.alpha), ...qstarCore.klToParents(found.axes, alpha),
    qstarCore.logPartitionOf(found.axes, alpha), qstarCore.slopeOf(found.axes, alpha),
    ...q.mean, ...q.covariance,
  ];
})
"""


def random_gaussians(count: int) -> list[tuple[Gaussian, Gaussian, float]]:
    """Pairs near and far, round and thin: widths from 0.14 to 7, means some lengths apart."""
    rng = np.random.default_rng(12)
    pairs = []
    for _ in range(count):
        parents = []
        for _ in range(2):
            turn, spread = rng.uniform(0, np.pi), np.exp(rng.uniform(-2, 2, size=2))
            axes = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
            covariance = axes * spread @ axes.T
            parents.append(Gaussian(3 * rng.normal(size=2), (covariance + covariance.T) / 2))
        pairs.append((*parents, float(rng.uniform())))
    near = [(p, Gaussian(p.mean + 0.01, p.covariance * 1.02), alpha) for p, _, alpha in pairs[::20]]
    return [*pairs, *near]


def as_js(law: Gaussian) -> dict[str, list[float]]:
    (xx, xy), (_, yy) = law.covariance.tolist()
    return {"mean": law.mean.tolist(), "covariance": [xx, xy, yy]}


def of_gaussians(policy: Gaussian, teacher: Gaussian, alpha: float) -> list[float]:
    pair = gaussian.solve_pair("pair", policy, teacher)
    star = pair.balance.alpha
    (xx, xy), (_, yy) = pair.q_star.covariance
    return [
        star,
        pair.balance.chernoff,
        pair.kl_policy_teacher,
        pair.kl_teacher_policy,
        *map(float, gaussian.kl_to_parents(policy, teacher, star)),
        *map(float, gaussian.kl_to_parents(policy, teacher, alpha)),
        float(gaussian.log_partition(policy, teacher, alpha)),
        float(gaussian.kl_gap(policy, teacher, alpha)),
        *pair.q_star.mean,
        xx,
        xy,
        yy,
    ]


@pytest.fixture(scope="module")
def gaussians() -> tuple[list[Any], list[list[float]]]:
    pairs = random_gaussians(1000)
    given = [(as_js(p), as_js(t), alpha) for p, t, alpha in pairs]
    return given, [of_gaussians(*pair) for pair in pairs]


def test_a_thousand_gaussian_pairs_are_the_package_s(core: Page, gaussians: Any):
    given, expected = gaussians
    assert worst(core.evaluate(GAUSSIANS, given), expected) < CLOSE


def test_parents_exchanged_are_not_the_package_s(core: Page, gaussians: Any):
    """The control: the comparison above sees which parent has the exponent."""
    given, expected = gaussians
    exchanged = [(teacher, policy, alpha) for policy, teacher, alpha in given]
    assert worst(core.evaluate(GAUSSIANS, exchanged), expected) > 1e-3


def test_acceptance_in_the_plane_is_a_sum_over_cells(core: Page):
    """Shown with three digits; here against a grid of our own, on the densities themselves."""
    for policy, teacher, _ in random_gaussians(12):
        alpha = gaussian.solve_kl_symmetry(policy, teacher).alpha
        q = gaussian.geometric_mean(policy, teacher, alpha)
        for name, parent in (("policy", policy), ("teacher", teacher)):
            reach = 8 * np.sqrt(np.diag(q.covariance))
            axes = [np.linspace(m - r, m + r, 1201) for m, r in zip(q.mean, reach, strict=True)]
            cells = np.stack(np.meshgrid(*axes), axis=-1)
            area = np.prod([axis[1] - axis[0] for axis in axes])
            least = np.minimum(q.log_density(cells), parent.log_density(cells))
            found = core.evaluate(
                """([policy, teacher, alpha, name]) =>
                  qstarCore.acceptanceOf(qstarCore.axesOf(policy, teacher), alpha, name)""",
                [as_js(policy), as_js(teacher), alpha, name],
            )
            assert abs(found - float(np.exp(least).sum() * area)) < 2e-4


# --- Rows ----------------------------------------------------------------------------------------

ROWS = r"""
(pairs) => pairs.map(([policy, teacher, alpha]) => {
  const { status, ...found } = qstarCore.solveRows(policy, teacher);
  const q = qstarCore.rowMean(policy, teacher, found.alpha);
  const [p, t] = [policy, teacher].map((row) => row.map(Math.exp));
  return [status, [
    found.alpha, found.chernoff, found.klToPolicy, found.klToTeacher,
    qstarCore.kl(p, t), qstarCore.kl(t, p), qstarCore.overlap(p, q), qstarCore.overlap(t, q),
    ...q, ...qstarCore.rowMean(policy, teacher, alpha),
  ]];
})
"""


def random_rows(count: int) -> list[tuple[np.ndarray, np.ndarray, float]]:
    """Three to ten tokens, sharp and flat; of some, one parent lacks a token or two."""
    rng = np.random.default_rng(21)
    rows = []
    for at in range(count):
        vocab = int(rng.integers(3, 11))
        pair = rng.dirichlet([rng.uniform(0.2, 3)] * vocab, size=2) + 1e-12
        if at % 5 == 0:
            pair[at // 5 % 2, : int(rng.integers(1, vocab - 1))] = 0
        with np.errstate(divide="ignore"):
            policy, teacher = np.log(pair / pair.sum(axis=1, keepdims=True))
        rows.append((policy, teacher, float(rng.uniform(0.01, 0.99))))
    return rows


def of_rows(policy: np.ndarray, teacher: np.ndarray, alpha: float) -> tuple[str, list[float]]:
    balance = solve_kl_symmetry(policy, teacher)
    log_q = log_geometric_mean(policy, teacher, balance.alpha)
    return str(balance.status), [
        float(balance.alpha),
        float(balance.chernoff),
        float(balance.kl_to_policy),
        float(balance.kl_to_teacher),
        float(kl(policy, teacher)),
        float(kl(teacher, policy)),
        float(acceptance_probability(policy, log_q)),
        float(acceptance_probability(teacher, log_q)),
        *np.exp(log_q),
        *np.exp(log_geometric_mean(policy, teacher, alpha)),
    ]


def test_a_thousand_pairs_of_rows_are_the_package_s(core: Page):
    rows = random_rows(1000)
    found = core.evaluate(ROWS, [(p.tolist(), t.tolist(), alpha) for p, t, alpha in rows])
    statuses = set()
    for (status, numbers), pair in zip(found, rows, strict=True):
        expected_status, expected = of_rows(*pair)
        assert status == expected_status
        assert worst(numbers, expected) < CLOSE, pair
        statuses.add(status)
    assert statuses == {"interior", "boundary_0", "boundary_1"}


def test_one_half_is_not_alpha_star_of_a_row(core: Page):
    """The control of the test above: q at one half is told from q*."""
    policy, teacher = np.log([[0.9, 0.05, 0.05], [0.2, 0.3, 0.5]])
    rows = [policy.tolist(), teacher.tolist()]
    found = core.evaluate("([p, t]) => qstarCore.rowMean(p, t, 0.5)", rows)
    star = np.exp(log_geometric_mean(policy, teacher, solve_kl_symmetry(policy, teacher).alpha))
    assert worst(found, star) > 1e-3


def test_equal_and_disjoint_rows_have_their_status(core: Page):
    status = "([p, t]) => qstarCore.solveRows(p, t).status"
    never = float("-inf")
    assert core.evaluate(status, [[-np.log(2)] * 2] * 2) == "degenerate_all"
    assert core.evaluate(status, [[0.0, never], [never, 0.0]]) == "disjoint"


# --- Samplers ------------------------------------------------------------------------------------

PICKS = r"""
([draft, target, count, rule]) => {
  const law = target.map(() => 0);
  let accepted = 0;
  const program = (chance) => qstarCore.pickToken(chance, draft, target, count, rule);
  for (const [pick, weight] of qstarCore.everyOutcome(program)) {
    law[pick.token] += weight;
    accepted += pick.accepted * weight;
  }
  return [law, accepted, qstarCore.lawOfRule(draft, target, count, rule)];
}
"""


def pairs_to_sample() -> list[tuple[np.ndarray, np.ndarray]]:
    """A draft and its target, q*, each."""
    rows = [(p, t) for p, t, _ in random_rows(60) if len(p) <= 4]
    return [
        (p, log_geometric_mean(p, t, balance.alpha))
        for p, t in rows
        if (balance := solve_kl_symmetry(p, t)).status == "interior"
    ][:6]


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("rule", ["exact", "source", "patched"])
def test_what_the_loop_emits_is_what_the_package_s_loop_emits(core: Page, rule: str, count: int):
    """Every branch of both: the script's sampler, and the package's."""
    import torch

    loops = {"exact": accept_or_redraw, "source": source_loop}
    for draft, target in pairs_to_sample():
        p, q = np.exp(draft), np.exp(target)
        found, accepted, formula = core.evaluate(PICKS, [p.tolist(), q.tolist(), count, rule])
        if rule == "patched":
            policy, star = torch.tensor(p), torch.tensor(q)

            def patched(chance: Any, policy: Any = policy, star: Any = star) -> Any:
                drawn = draw_candidates(policy.log(), count, replacement=True, generator=chance)
                return patched_loop(drawn, policy, star, chance)

            law, kept = token_distribution(patched, len(p)), accepted
        else:
            law, kept = pick_distribution(
                loops[rule], draw_candidates, draft, target, count, replacement=True
            )
        assert worst([*found, accepted], [*law, kept]) < CLOSE
        assert worst(formula, law) < CLOSE
        biased = rule == "source" or (rule == "patched" and count > 1)
        assert (worst(found, q) > 1e-3) == biased, "the control: the biased loop is caught"


def test_a_round_emits_what_the_package_s_round_emits(core: Page):
    for draft, target in pairs_to_sample()[:3]:
        vocab, gamma = len(draft), 2
        joint, accepted = core.evaluate(
            """([draft, target, gamma]) => {
              const vocab = target.length;
              const joint = Array(vocab ** (gamma + 1)).fill(0);
              const counts = Array(gamma + 1).fill(0);
              const add = (tokens, weight) => {
                if (tokens.length <= gamma) {
                  target.forEach((p, next) => add([...tokens, next], p * weight));
                } else joint[tokens.reduce((at, token) => at * vocab + token, 0)] += weight;
              };
              const program = (chance) => qstarCore.verifyBlock(chance, draft, target, gamma);
              for (const [round, weight] of qstarCore.everyOutcome(program)) {
                counts[round.accepted] += weight;
                add(round.tokens, weight);
              }
              return [joint, counts];
            }""",
            [np.exp(draft).tolist(), np.exp(target).tolist(), gamma],
        )
        shapes = [(vocab,) * (at + 1) for at in range(gamma + 1)]
        drafts = [np.broadcast_to(draft, shape) for shape in shapes[:gamma]]
        targets = [np.broadcast_to(target, shape) for shape in shapes]
        law, accepted_law, _ = block_distribution(verify, drafts, targets)
        assert worst(accepted, accepted_law) < CLOSE
        assert worst(joint, law.ravel()) < CLOSE
        assert worst(joint, joint_distribution(targets).ravel()) < CLOSE


def test_seeded_draws_follow_what_they_are_drawn_from(core: Page):
    """Chi-squared over 9 degrees of freedom: beyond 64 once in 2e-10."""
    law = (np.arange(1, 11) / 55).tolist()
    counts = core.evaluate(
        """(law) => {
          const chance = qstarCore.seededChance(7);
          const counts = law.map(() => 0);
          for (let at = 0; at < 100000; at++) counts[chance.draw(law)]++;
          return counts;
        }""",
        law,
    )
    expected = 1e5 * np.array(law)
    assert ((np.array(counts) - expected) ** 2 / expected).sum() < 64
    flat = np.full(10, 1e4)
    assert ((np.array(counts) - flat) ** 2 / flat).sum() > 64


# --- Costs ---------------------------------------------------------------------------------------


def test_a_thousand_speed_ups_are_the_package_s(core: Page):
    rng = np.random.default_rng(5)
    asked, expected = [], []
    schemes = ("one-sided", "alternating", "coin", "lookup", "draft-model", "plain")
    for at in range(1002):
        widths = [1, *sorted(rng.choice(np.arange(2, 17), size=rng.integers(0, 5), replace=False))]
        times = {
            model: {int(w): float(rng.uniform(0.5, 2)) for w in widths}
            for model in ("policy", "teacher", "draft")
        }
        overhead = float(rng.uniform(0, 0.2))
        accept = {
            who: float(rng.uniform()) for who in ("policy", "teacher", "coin", "draft", "lookup")
        }
        gamma = None if at % 4 == 0 else int(rng.integers(1, 9))
        stay = tuple(map(float, rng.uniform(0, 0.95, size=2)))
        scheme = schemes[at % len(schemes)]
        written = {
            model: {str(w): s for w, s in seconds.items()} for model, seconds in times.items()
        }
        asked.append([accept, written | {"overhead": overhead}, scheme, gamma, list(stay)])
        measured = costs.Costs(**times, overhead=overhead)
        expected.append(costs.expected_speedup(accept, measured, scheme, gamma=gamma, stay=stay))
    speedups = "(all) => all.map((asked) => qstarCore.expectedSpeedup(...asked))"
    assert worst(core.evaluate(speedups, asked), expected) < CLOSE
    one_longer = [[*some[:3], (some[3] or 0) + 1, some[4]] for some in asked]
    assert worst(core.evaluate(speedups, one_longer), expected) > 1e-2, "the control"


# --- The explorers in a page ---------------------------------------------------------------------

PAGE = """<!doctype html><html lang="en" data-theme="light"><head><meta charset="utf8">
<meta name="viewport" content="width=device-width"><title>Explorers</title><style>
* {{ box-sizing: border-box }} body {{ margin: 8px; font: 16px sans-serif }}</style>
<link rel="stylesheet" href="{static}/explorer.css">{scripts}</head>
<body class="bd-article">{explorers}</body></html>"""


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every explorer in one bare page on the disk: as in the book, without the theme around it."""
    folder = tmp_path_factory.mktemp("explorers")
    names = ["qstar-core", "explorer", *(f"explorer-{name}" for name in EXPLORERS)]
    scripts = [f'<script src="{(STATIC / name).as_uri()}.js"></script>' for name in names]
    shown = [markup(name, data_of(name), f"{name}.png") for name in EXPLORERS]
    page = folder / "page.html"
    page.write_text(
        PAGE.format(static=STATIC.as_uri(), scripts="".join(scripts), explorers="".join(shown)),
        encoding="utf8",
    )
    return page


@pytest.fixture
def explorers(browser: Browser, page_file: Path) -> Iterator[Page]:
    """That page, opened; what went wrong in it fails the test at its end."""
    context = browser.new_context(viewport={"width": 900, "height": 900}, reduced_motion="reduce")
    page, wrong = context.new_page(), []
    page.on("console", lambda said: said.type == "error" and wrong.append(said.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda asked: asked.url.startswith("file:") or wrong.append(asked.url))
    page.goto(page_file.as_uri())
    yield page
    context.close()
    assert wrong == []


def cell(page: Page, explorer: str, name: str) -> str:
    row = page.locator(f"#explorer-{explorer} tr").filter(has_text=name)
    return row.first.locator("td").first.inner_text()


def test_together_they_are_small():
    files = [*STATIC.glob("explorer*"), STATIC / "qstar-core.js"]
    assert {f"explorer-{name}.js" for name in EXPLORERS} < {file.name for file in files}
    assert sum(file.stat().st_size for file in files) <= 80_000


def test_each_pair_of_the_chapter_has_the_package_s_numbers(explorers: Page):
    groups = data_of("gaussians")["presets"]
    cases = [case for group in groups.values() for case in group]
    assert len(groups["the nine cases"]) == 9
    assert len(groups["rows of the table"]) == 5
    for at, case in enumerate(cases):
        explorers.get_by_label("Pair").first.select_option(str(at))
        pair = preset_pair(case)
        shown = [
            cell(explorers, "gaussians", name)
            for name in ("where they meet", "divergence there", "KL(policy ‖ teacher)")
        ]
        balance = pair.balance
        expected = (balance.alpha, balance.chernoff, pair.kl_policy_teacher)
        written = [f"{value:.3f}" for value in expected]
        assert shown == [written[0], f"{written[1]} nats", written[2]], case["name"]


def test_keys_move_the_marks_and_the_numbers(explorers: Page):
    before = cell(explorers, "gaussians", "where they meet")
    mean = explorers.get_by_role("slider", name="mean of the policy")
    place = mean.get_attribute("aria-valuetext")
    mean.focus()
    for key in ("ArrowRight", "ArrowUp", "Shift+ArrowUp"):
        explorers.keyboard.press(key)
    assert mean.get_attribute("aria-valuetext") != place
    axis = explorers.get_by_role("slider", name="first axis of the policy")
    turned = axis.get_attribute("aria-valuetext")
    axis.focus()
    explorers.keyboard.press("ArrowLeft")
    explorers.keyboard.press("ArrowUp")
    assert axis.get_attribute("aria-valuetext") != turned
    assert cell(explorers, "gaussians", "where they meet") != before
    drafted = explorers.get_by_role("slider", name="policy, token A")
    probability = float(drafted.get_attribute("aria-valuenow") or 0)
    drafted.focus()
    explorers.keyboard.press("ArrowDown")
    assert abs(float(drafted.get_attribute("aria-valuenow") or 0) - probability + 0.01) < 1e-3


def test_a_pointer_drags_a_mark(explorers: Page):
    mean = explorers.get_by_role("slider", name="mean of the teacher")
    mean.scroll_into_view_if_needed()
    place, box = mean.get_attribute("aria-valuetext"), mean.bounding_box()
    assert box
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    explorers.mouse.move(x, y)
    explorers.mouse.down()
    explorers.mouse.move(x + 30, y + 60, steps=4)
    explorers.mouse.up()
    assert mean.get_attribute("aria-valuetext") != place
    assert explorers.get_by_label("Pair").first.input_value() == "-1"


def test_a_finger_drags_a_mark_and_scrolls_beside_it(browser: Browser, page_file: Path):
    context = browser.new_context(viewport={"width": 375, "height": 700}, has_touch=True)
    page = context.new_page()
    page.goto(page_file.as_uri())
    mean = page.get_by_role("slider", name="mean of the policy")
    place, box = mean.get_attribute("aria-valuetext"), mean.bounding_box()
    assert box
    finger = context.new_cdp_session(page)

    def drag(x: float, y: float) -> None:
        for kind, down in (("touchStart", 0), ("touchMove", -20), ("touchMove", -60)):
            point = [{"x": x, "y": y + down}]
            finger.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": point})
        finger.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})

    drag(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    moved = mean.get_attribute("aria-valuetext")
    assert moved != place
    assert page.evaluate("scrollY") == 0
    page.get_by_label("Pair").first.select_option("0")
    there = mean.get_attribute("aria-valuetext")
    drag(40, 600)
    page.wait_for_function("scrollY > 0")
    assert mean.get_attribute("aria-valuetext") == there
    context.close()


def test_an_address_restores_what_was_seen(explorers: Page, page_file: Path):
    explorers.get_by_label("Pair").first.select_option("7")
    explorers.get_by_role("slider", name="mean of the policy").press("ArrowRight")
    explorers.locator("#explorer-tokens").get_by_label("Tokens", exact=True).select_option("5")
    explorers.get_by_label("Rule").select_option("exact")
    explorers.wait_for_function("/gaussians=x.*tokens=exact/.test(location.search)")
    seen = explorers.locator("table").all_inner_texts()
    explorers.goto(explorers.url)
    assert explorers.locator("table").all_inner_texts() == seen
    explorers.goto(page_file.as_uri())
    assert explorers.locator("table").all_inner_texts() != seen, "the control"


@pytest.mark.parametrize(
    "written",
    [
        "gaussians=x_s_0_0_1_2_1_0_0_1_0_1",
        "gaussians=p99_7&tokens=__",
        "gaussians=x_s_NaN&tokens=exact_x_x_1_2_3_4_5_6_7_-8",
        "tokens=exact_1e9_p77",
    ],
)
def test_an_address_that_makes_no_sense_does_no_harm(
    explorers: Page, page_file: Path, written: str
):
    explorers.goto(f"{page_file.as_uri()}?{written}")
    assert cell(explorers, "gaussians", "where they meet") == "0.344"
    assert cell(explorers, "tokens", "exponent on the policy") == "0.492"


def test_steps_make_rounds_and_many_rounds_show_the_bias(explorers: Page):
    tokens = explorers.locator("#explorer-tokens")
    step = tokens.get_by_role("button", name="Step")
    for _ in range(6):
        step.click()
    assert tokens.locator("ol li").count() >= 2
    tokens.get_by_role("button", name="Run").click()  # at once, where no motion is wanted
    drawn, bias, noise = (
        float(cell(explorers, "tokens", name))
        for name in ("what was drawn", "rule’s distribution", "chance alone")
    )
    policy, teacher = (np.log(data_of("tokens")["presets"][0][x]) for x in PARENTS)
    q = log_geometric_mean(policy, teacher, solve_kl_symmetry(policy, teacher).alpha)
    expected = np.abs(source_loop_distribution(policy, q, 2) - np.exp(q)).sum() / 2
    assert abs(bias - expected) < 1e-4
    assert abs(drawn - bias) < 8 * noise < bias
    tokens.get_by_label("Rule").select_option("exact")
    tokens.get_by_role("button", name="Run").click()
    assert float(cell(explorers, "tokens", "what was drawn")) < 8 * noise


def test_what_pays_is_what_the_cost_model_expects(explorers: Page):
    data = data_of("pays")
    for at, given in enumerate(data["cells"]):
        explorers.get_by_label("Forwards").select_option(str(at))
        seconds = {int(width): spent for width, spent in given["seconds"].items()}
        measured = costs.Costs(seconds, seconds)
        accept = float(f"{np.mean([given['accept'][parent] for parent in PARENTS]):.5g}")
        chances: dict[str, float] = {"policy": accept, "teacher": accept}
        alternating = costs.expected_speedup(chances, measured, "alternating", gamma=1)
        assert cell(explorers, "pays", "alternating") == f"{alternating:.2f}"
        if "coin" in given["accept"]:
            chances["coin"] = given["accept"]["coin"]
            gamma = data["coinGamma"]
            coin = costs.expected_speedup(chances, measured, "coin", gamma=gamma)
            assert abs(float(cell(explorers, "pays", "coin")) - coin) < 0.02, given["name"]


def test_the_marks_are_the_published_measurements():
    points = {
        (cell["name"], point["scheme"], point["gamma"]): point["median"]
        for cell in data_of("pays")["cells"]
        for point in cell["points"]
    }
    speed = read_expected(ROOT / "data" / "expected" / "speed.json")
    found = 0
    for shape, percent in (("7B", 60), ("7B", 80), ("7B", 90), ("7B", 95), ("1B", 90)):
        for way, gamma in (("alternating-1", 1), ("coin", None)):
            name = f"{shape} shape at {percent / 100:g}, H200"
            median = points[name, way.split("-")[0], gamma]
            assert abs(median - float(speed[f"speed-{shape}-{percent}-{way}"].value)) < 1e-4
            found += 1
    assert found == 10
    coin = read_expected(ROOT / "data" / "expected" / "speculative_decoding.json")
    names = dict(MEASURED)
    keys = {"two prompts": "real", "noised copy": "noised"}
    keys |= {"lora-manual": "manual", "lora-arithmetic": "arithmetic"}
    assert keys.keys() == names.keys()
    for pair, key in keys.items():
        for way, (scheme, gamma) in {"turns": ("alternating", 1), "coin": ("coin", None)}.items():
            median = points[names[pair], scheme, gamma]
            assert abs(median - float(coin[f"ch7-coin-{key}-{way}-wall"].value)) < 1e-4


def test_a_recorded_text_is_walked_by_the_arrow_keys(explorers: Page):
    text = explorers.locator("#explorer-spoken")
    tokens = data_of("spoken")["texts"][0]["tokens"]
    shown = text.locator(".qs-spoken button")
    assert [word.replace("⏎", "\n") for word in shown.all_text_contents()] == [
        token["text"] for token in tokens
    ]
    shown.nth(3).focus()
    for at, token in enumerate(tokens[4:9], start=4):
        explorers.keyboard.press("ArrowRight")
        said = text.locator(".qs-spoken + p").inner_text()
        assert f"α* {token['alpha']:.2f}" in said, at
        assert (", kept" in said) == (token["kept"] and token["by"] != "none"), at


def test_what_is_recorded_of_a_text_is_what_the_models_say():
    """On a model small enough to ask again, position by position."""
    import torch

    from qstar.decoding.enumeration import tiny_model
    from qstar_book.records import spoken

    class Tokenizer:
        all_special_ids = ()

        def decode(self, ids: list[int]) -> str:
            return f"t{ids[0]}"

    models = tiny_model(4, vocab=6), tiny_model(5, vocab=6)
    prompts = torch.tensor([0, 1, 2]), torch.tensor([2, 1])
    found = spoken.record(models, Tokenizer(), prompts, max_new_tokens=8, seed=3)
    tokens = torch.tensor([int(token["text"][1:]) for token in found])
    laws = [
        log_distributions(model, ids, tokens).double().numpy()
        for model, ids in zip(models, prompts, strict=True)
    ]
    balance = solve_kl_symmetry(*laws)
    assert worst([token["alpha"] for token in found], balance.alpha) < 1e-4
    assert worst([token["chernoff"] for token in found], balance.chernoff) < 1e-4
    log_q = log_geometric_mean(*laws, balance.alpha)
    for at, token in enumerate(found):
        for top, law in zip(token["top"], (laws[0], log_q, laws[1]), strict=True):
            chances = [p for _, p in top]
            assert worst(chances[:-1], np.sort(np.exp(law[at]))[::-1][: spoken.TOP]) < 1e-3
            assert abs(chances[-1] - np.exp(law[at][tokens[at]])) < 1e-3
        if token["by"] in PARENTS:
            drafted = laws[PARENTS.index(token["by"])][at]
            assert abs(token["accept"] - acceptance_probability(drafted, log_q[at])) < 1e-3
    assert any(not token["kept"] for token in found)


@pytest.mark.parametrize("width", [320, 375])
def test_nothing_is_wider_than_a_phone(explorers: Page, width: int):
    explorers.set_viewport_size({"width": width, "height": 700})
    assert explorers.evaluate("document.documentElement.scrollWidth") <= width
    small = explorers.evaluate(
        """() => [...document.querySelectorAll(".qs-explorer :is(text, p, td, th, li)")]
          .filter((node) => node.textContent && parseFloat(getComputedStyle(node).fontSize) < 10)
          .length"""
    )
    assert small == 0


def test_without_scripts_there_is_a_picture(browser: Browser, page_file: Path):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(page_file.as_uri())
    pictures = page.locator("noscript img")
    alts = [pictures.nth(at).get_attribute("alt") for at in range(pictures.count())]
    context.close()
    assert alts == [one.alt for one in EXPLORERS.values()]


@pytest.mark.parametrize("name", EXPLORERS)
def test_the_picture_of_an_explorer_is_drawn(name: str):
    explorer = EXPLORERS[name]
    drawn = explorer.picture(data_of(name))
    assert drawn.axes
    assert len(explorer.alt) > 80
