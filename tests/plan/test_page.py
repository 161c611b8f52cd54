"""The page of a plan: whole, loading nothing, and saying what matters in words as well as in colours."""

import dataclasses
import re
from html.parser import HTMLParser

import pytest

from qwen_moe_jax.plan.mesh_drawing import mesh_svg
from qwen_moe_jax.plan.page import MARK, plan_page, write_plan_page
from qwen_moe_jax.plan.result import AxisTraffic, Flops, Remark
from tests.plan import samples
from tests.plan.samples import GB, collective, memory, plan, refused, roofline

VOID = {"meta", "path", "rect"}


class Page(HTMLParser):
    """Holds that tags close in order; keeps the text and the attributes."""

    def __init__(self, html):
        super().__init__()
        self.open, self.attributes, self.pieces = [], [], []
        self.feed(html)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, *attribute) for attribute in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, *attribute) for attribute in attrs]

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.pieces.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.pieces))


ONE = {"data": 1, "fsdp": 1, "expert": 1, "tensor": 1}
PLANS = {
    "fits": plan(),
    "over": plan(memory=memory(temporaries=120 * GB)),
    "refused": refused(),
    "four axes": plan(mesh={"data": 2, "fsdp": 8, "expert": 16, "tensor": 4}),
    "one device": plan(mesh=ONE, collectives=(), roofline=None, memory=memory(available=None)),
}


@pytest.mark.parametrize("name", PLANS)
def test_a_page_is_well_formed_and_loads_nothing(name):
    html = plan_page(PLANS[name])
    page = Page(html)
    assert "default-src 'none'" in html and "<script" not in html and "url(" not in html and "@import" not in html
    assert not [found for found in page.attributes if found[1] in {"src", "href", "srcset", "onclick", "onload"}]
    assert MARK in html[:200], "a command can tell its own files"


def test_the_verdict_comes_first_and_says_that_times_are_estimates():
    text = Page(plan_page(PLANS["fits"])).text
    verdict = text[: text.index("Remarks")]
    assert "Fits" in verdict and "32.80 GB of the 102.00 GB that a TPU v5p has" in verdict
    assert "Bound by the network, most of it over expert" in verdict
    assert "Estimate" in verdict and "2.36 s a step" in verdict and "4.57 s where nothing does" in verdict


def test_what_does_not_fit_is_said_and_seen():
    html = plan_page(PLANS["over"])
    text = Page(html).text
    assert "Does not fit" in text and "20.80 GB more than the 102.00 GB" in text
    assert 'class="excess"' in html and 'class="excess"' not in plan_page(PLANS["fits"])


def test_the_memory_bar_is_as_wide_as_its_parts():
    def widths(html):
        bar = html[html.index('<div class="bar"') : html.index('<p class="scale"')]
        return [float(share) for share in re.findall(r"width:([\d.]+)%", bar)]

    of = PLANS["fits"].memory
    assert sum(widths(plan_page(PLANS["fits"]))) == pytest.approx(100 * of.total / of.available, abs=0.01)
    assert sum(widths(plan_page(PLANS["over"]))) == pytest.approx(100, abs=0.01)
    less = plan(memory=memory(padding=-5 * GB))  # arguments that the program does not read
    assert "−5.00 GB" in Page(plan_page(less)).text and min(widths(plan_page(less))) >= 0


def test_gradients_are_a_part_of_the_temporaries_and_not_beside_them():
    text = Page(plan_page(PLANS["fits"])).text
    assert "2.00 GB" in text and "28.00 GB" in text and "30.00 GB" not in text


def test_a_refused_program_has_a_page():
    text = Page(plan_page(PLANS["refused"])).text
    assert "RESOURCE_EXHAUSTED" in text and "29.00 GB more" in text and "the program was refused" in text
    silent = dataclasses.replace(refused(), memory=dataclasses.replace(refused().memory, needed=None))
    assert "did not say how much memory" in Page(plan_page(silent)).text


def test_where_no_limit_is_known_nothing_is_promised():
    text = Page(plan_page(PLANS["one device"])).text
    assert "neither is whether it fits" in text and "Fits" not in text and "there is nothing to split" in text


def test_every_text_is_escaped():
    bad = "<b onclick=x>&\"'</b>"
    hostile = plan(
        target=dataclasses.replace(plan().target, name=bad, chip=bad),
        model=dataclasses.replace(plan().model, name=bad),
        work=dataclasses.replace(plan().work, dtype=bad, param_dtype=bad, execution={bad: bad}),
        memory=memory(groups=(dataclasses.replace(samples.PARAMETERS, name="parameters"), samples.group_named(bad))),
        collectives=(collective(source=bad, dtype=bad, widened_from=bad),),
        remarks=(Remark(about=bad, text=bad),),
        refusal=bad,
        roofline=roofline(traffic=(AxisTraffic(axes=("fsdp",), bytes=1, bandwidth=1.0, network=bad, seconds=1.0),)),
        versions={bad: bad},
    )
    html = plan_page(hostile)
    assert "<b onclick" not in html and "onclick=x>" not in html
    assert Page(html).text.count("<b onclick=x>") > 12


def test_collectives_without_a_count_are_not_given_one():
    unknown = plan(collectives=(collective(count=None),), roofline=None)
    text = Page(plan_page(unknown)).text
    assert "unknown" in text and "at least 188.74 MB" in text


def test_small_collectives_unfold():
    many = plan(collectives=tuple(collective(bytes=1000 - n) for n in range(20)))
    assert "4 smaller ones" in Page(plan_page(many)).text


def test_shardings_name_the_axes():
    html = plan_page(PLANS["fits"])
    row = html[html.index("experts.gate_proj</th>") :]
    row = row[: row.index("</tr>")]
    assert Page(f"<table>{row.partition('</th>')[2]}</table>").text.split(" bfloat16")[0].split() == (
        "94 × 128 expert × 1536 × 4096 fsdp".split()
    ), "tensor is of size 1 here and shards nothing"
    assert "on every device" in html


def test_flops_that_are_not_told_have_no_ratio():
    text = Page(plan_page(plan(flops=Flops(model=1e17, program=None)))).text
    assert "are not known" in text and "ratio" not in text


@pytest.mark.parametrize(
    ("mesh", "peers"),
    [
        (ONE, {}),
        ({**ONE, "fsdp": 8}, {"f": 7}),
        ({**ONE, "fsdp": 1024}, {"f": 14}),
        ({**ONE, "fsdp": 32, "expert": 8}, {"f": 8, "e": 7}),
        ({**ONE, "data": 2, "expert": 4, "tensor": 2}, {"d": 1, "e": 3, "t": 1}),
        ({"data": 2, "fsdp": 8, "expert": 16, "tensor": 4}, {"d": 1, "f": 2, "e": 3, "t": 3}),
    ],
)
def test_a_mesh_is_drawn_with_the_first_device_and_its_peers(mesh, peers):
    svg = mesh_svg(mesh)
    text = Page(svg).pieces
    assert svg.count('class="first"') == 1
    assert {letter: text.count(letter) for letter in "dfet" if letter in text} == peers
    for axis, size in mesh.items():
        assert (f"{axis} {size}" in text) == (size > 1), "an axis that splits has its name and size next to it"
    assert svg.count("<title>") <= 512, "long axes leave out their middle"


def test_a_page_is_written_whole(tmp_path):
    write_plan_page(plan(), tmp_path / "plan.html")
    assert (tmp_path / "plan.html").read_text(encoding="utf-8") == plan_page(plan())
    assert [path.name for path in tmp_path.iterdir()] == ["plan.html"]


def test_the_page_says_in_how_many_bits_the_weights_are_stored():
    work = plan().work
    low_bit = plan(work=dataclasses.replace(work, execution={**work.execution, "weights": "int4"}))
    assert "weights float32, activations bfloat16" in plan_page(plan())
    assert "weights int4 and float32, activations bfloat16" in plan_page(low_bit)
