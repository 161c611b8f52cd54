"""A prompt's routing on the terminal: per layer, the experts of every token and the tokens of every expert."""

from collections.abc import Sequence

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from qwen_moe_jax.cli.routing import Choice, LayerRouting, PromptRouting

#: Of a layer's experts, so many are listed with their tokens, the busiest first, each on so many lines at most. The
#: rest is counted: nothing is lost that the tokens' table above does not show.
EXPERTS_LISTED = 16
LINES_PER_EXPERT = 2
LONGEST_TOKEN = 20

_BETWEEN = " · "
_GAP = 2  # columns between the cells of a row
_DROPPED = "✗"


def print_routing(routing: PromptRouting, console: Console) -> None:
    """Prints every layer; lines are truncated to the console's width; a pipe gets plain text."""
    factor = "" if routing.capacity_factor is None else f", factor {routing.capacity_factor:g}"
    sizes = f"{len(routing.tokens)} tokens · {routing.num_experts} experts · dispatch {routing.dispatch}{factor}"
    console.print(Text.assemble((routing.model, "bold"), f" · {sizes}"))
    for layer in routing.layers:
        console.print()
        console.print(_headline(routing, layer))
        console.print(_tokens_table(routing, layer, console.width))
        console.print()
        console.print(_experts_table(routing, layer, console.width))


def _headline(routing: PromptRouting, layer: LayerRouting) -> Text:
    dropped = int(layer.dropped.sum())
    parts = [
        (f"Layer {layer.layer}", "bold cyan"),
        f"entropy {layer.entropy:.2f} of {layer.uniform_entropy:.2f} nats",
        f"busiest expert {layer.busiest}: {layer.load.max()} tokens, {layer.imbalance:.1f} × the mean",
        (f"dropped {dropped} of {routing.choices_per_layer}", "bold red" if dropped else ""),
        *([f"{layer.rounds} rounds"] if layer.rounds > 1 else []),
    ]
    return Text(_BETWEEN).join(Text(part) if isinstance(part, str) else Text(*part) for part in parts)


def _tokens_table(routing: PromptRouting, layer: LayerRouting, width: int) -> Table:
    """One row per token: its experts with their weights, the largest first."""
    numbers = [Text(str(number), style="dim") for number in range(len(routing.tokens))]
    tokens = [_shortened(token, width) for token in routing.tokens]
    table, rest = _table({"#": numbers, "token": tokens, "experts and their weights": []}, width)
    choices, active = layer.choices(), layer.experts.shape[1]
    digits, marked = len(str(routing.num_experts - 1)), bool(layer.dropped.any())
    for row, (number, token) in enumerate(zip(numbers, tokens, strict=True)):
        chosen = [_weighted(choice, digits, marked) for choice in choices[row * active : (row + 1) * active]]
        table.add_row(number, token, _flow(chosen, rest))
    return table


def _experts_table(routing: PromptRouting, layer: LayerRouting, width: int) -> Group:
    """One row per expert that tokens chose, the busiest first, and a line for the rest."""
    received = layer.choices_by_expert()
    listed = list(received.items())[:EXPERTS_LISTED]
    experts = [Text(str(expert)) for expert, _ in listed]
    loads = [Text(str(len(choices))) for _, choices in listed]
    table, rest = _table({"expert": experts, "load": loads, "tokens": []}, width)
    for expert, load, (_, choices) in zip(experts, loads, listed, strict=True):
        tokens = [_numbered(choice, _shortened(routing.tokens[choice.token], width)) for choice in choices]
        table.add_row(expert, load, _flow(tokens, rest, LINES_PER_EXPERT))
    others = [len(choices) for choices in received.values()][EXPERTS_LISTED:]
    unlisted = []
    if others:
        unlisted.append(f"{_counted(len(others), 'more expert')} with {_span(min(others), max(others))} each")
    if idle := routing.num_experts - len(received):
        unlisted.append(f"{_counted(idle, 'expert')} with none")
    return Group(table, Text(", ".join(unlisted), style="dim")) if unlisted else Group(table)


def _table(columns: dict[str, list[Text]], width: int) -> tuple[Table, int]:
    """A table without rows, its columns as wide as their contents, and the width that is left for the last one."""
    table = Table(box=None, padding=(0, _GAP, 0, 0), pad_edge=False, header_style="dim")
    *sized, last = columns
    for head in sized:
        size = max(len(head), *(text.cell_len for text in columns[head]))
        table.add_column(head, justify="left" if head == "token" else "right", width=size, no_wrap=True)
        width -= size + _GAP
    rest = max(width, 1)
    table.add_column(last, width=rest, no_wrap=True)
    return table, rest


def _weighted(choice: Choice, digits: int, marked: bool) -> Text:
    """An expert and its weight; where some choices are marked, the others leave a blank."""
    weight = f"{choice.weight:.2f}".removeprefix("0")
    text = Text.assemble((f"{choice.expert:{digits}}", "bold" if choice.rank == 0 else ""), f" {weight:>3}")
    return _crossed(text) if choice.dropped else Text.assemble(text, " " if marked else "")


def _numbered(choice: Choice, token: Text) -> Text:
    text = Text.assemble((f"{choice.token} ", "dim"), token)
    return _crossed(text) if choice.dropped else text


def _crossed(text: Text) -> Text:
    return Text.assemble(text, _DROPPED, style="red")


def _shortened(token: str, width: int) -> Text:
    text = Text(token)
    text.truncate(min(LONGEST_TOKEN, max(width // 4, 6)), overflow="ellipsis")
    return text


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _span(least: int, most: int) -> str:
    return _counted(most, "token") if least == most else f"{least} to {most} tokens"


def _flow(words: Sequence[Text], width: int, max_lines: int | None = None) -> Text:
    """Words wrapped into lines; where there are more than `max_lines`, the last line counts the rest."""
    lines: list[list[Text]] = [[]]
    for word in words:
        if lines[-1] and _length([*lines[-1], word]) > width:
            lines.append([])
        lines[-1].append(word)
    if max_lines is not None and len(lines) > max_lines:
        last, missing = lines[max_lines - 1], sum(map(len, lines[max_lines:]))
        while last and _length([*last, _more(missing)]) > width:
            last.pop()
            missing += 1
        lines = [*lines[: max_lines - 1], [*last, _more(missing)]]
    between = Text.assemble((_BETWEEN, "dim"))  # a style of its own would go over to what it joins
    return Text("\n").join(between.join(line) for line in lines)


def _more(count: int) -> Text:
    return Text(f"… {count} more", style="dim")


def _length(words: Sequence[Text]) -> int:
    return sum(word.cell_len for word in words) + len(_BETWEEN) * (len(words) - 1)
