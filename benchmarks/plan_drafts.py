"""Which training steps fit on pods, by arithmetic alone: `python benchmarks/plan_drafts.py CHIP …`.

For each step of `pod_steps` on the chips that are named (v5p, v6e, h200), a line of a table: the first remat of dots,
experts and full under which it may fit, with memory of a device and bytes that it sends, as `plan.draft` estimates
them. Nothing is compiled, but the extras `plan` and `plan-gpu` have to name the devices. `plan_table.py` compiles.
"""

import sys

import pod_steps


def main(*chips: str) -> None:
    """Prints the table."""
    print("| step | remat | memory of a device | sent |\n|---|---|---|---|")
    for step in pod_steps.steps():
        if step.name.split("-")[-1] in chips:
            remat, found = pod_steps.first_that_fits(step)
            used = f"{found.total / 1e9:.0f} of {(found.available or 0) / 1e9:.0f} GB"
            print(f"| {step.name} | {remat or 'none fits'} | {used} | {found.sent / 1e9:.0f} GB |", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
