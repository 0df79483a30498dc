"""Jinja for chat templates from anywhere: they reach nothing outside, and are bounded in time and size.

Jinja's own sandbox keeps a template from the process. What it does not bound is work: nested loops, recursion,
repeated squaring, `'x' * 10**9`, formats with huge widths. Here everything that can repeat or grow pays for its size
from a budget, and what would be large is refused before it is made. Nothing is measured by a clock, so whether a
template passes depends on the template and its messages alone.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sized
from datetime import datetime
from typing import Any, Final

import jinja2.ext
from jinja2 import nodes
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

_STEPS: Final = 1_000_000  # calls, loop iterations, container entries and so on; real templates take some 50 a message
_STEP_CHARACTERS: Final = 100  # of a string cost as much as one step
_CHARACTERS: Final = 2**22  # of one string; the messages' own characters come on top, a few times over
_LARGEST_NUMBER: Final = 100_000  # as an argument: a width, a count, an indentation
_LARGEST_INTEGER: Final = 4096  # bits
_LONG_NUMBER: Final = re.compile(r"\d{6}|\*")
_NESTED_SPECIFICATION: Final = re.compile(r":[^{}]*\{")
_LONGEST_TEMPLATE: Final = 2**20

_FILTERS: Final = (
    *("abs", "attr", "batch", "capitalize", "center", "count", "d", "default", "dictsort", "e", "escape", "first"),
    *("float", "forceescape", "format", "groupby", "indent", "int", "items", "join", "last", "length", "list", "lower"),
    *("map", "max", "min", "reject", "rejectattr", "replace", "reverse", "round", "safe", "select", "selectattr"),
    *(
        "filesizeformat",
        "pprint",
        "slice",
        "sort",
        "string",
        "sum",
        "title",
        "trim",
        "truncate",
        "unique",
        "upper",
        "urlencode",
        "wordcount",
    ),
)
_SIZED: Final = ("batch", "center", "indent", "round", "slice", "truncate")  # filters whose numbers are sizes


class BudgetError(jinja2.TemplateError):
    """A template takes more steps, or makes larger strings, than any conversation needs."""


class Budget:
    """What one rendering may cost, given how many characters it lays out."""

    def __init__(self, num_characters: int) -> None:
        self.steps = _STEPS + 2 * num_characters
        self.characters = _CHARACTERS + 8 * num_characters

    def pay(self, steps: int) -> None:
        self.steps -= steps
        if self.steps < 0:
            raise BudgetError("it does not come to an end")

    def check(self, num_characters: int) -> None:
        """Refuse a string of this size, before it is made."""
        if num_characters > self.characters:
            raise BudgetError(f"it makes a string of {num_characters:,} characters")

    def weigh(self, value: Any) -> Any:
        """Pay for the size of a value, everything in it included, and return it."""
        pending = [value]
        while pending:
            part = pending.pop()
            self.pay(1)
            if isinstance(part, (str, bytes)):
                self.check(len(part))
                self.pay(len(part) // _STEP_CHARACTERS)
            elif isinstance(part, (list, tuple, set, frozenset)):
                self.pay(len(part))
                pending.extend(part)
            elif isinstance(part, dict):
                self.pay(len(part))
                pending.extend(part)
                pending.extend(part.values())
            elif isinstance(part, Sized):  # a range, a view of a dict
                self.pay(len(part))
            elif isinstance(part, Namespace):
                pending.append(part._Namespace__attrs)  # type: ignore[attr-defined]
        return value

    def counted(self, value: Any) -> Any:
        """Pay for a walk through an iterable, at once where its length is known and else as it goes."""
        if isinstance(value, Sized):
            self.pay(len(value))
            return value
        return self._counted(value) if isinstance(value, Iterable) else value

    def _counted(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self.pay(1)
            yield value

    def check_numbers(self, values: Iterable[Any]) -> None:
        """Refuse numbers that can only be meant as enormous sizes."""
        for value in values:
            if isinstance(value, (int, float)) and not -_LARGEST_NUMBER <= value <= _LARGEST_NUMBER:
                raise BudgetError(f"it asks for a size of {value:.3g}, expected at most {_LARGEST_NUMBER}")

    def check_format(self, pattern: str) -> None:
        """Refuse widths and precisions that are enormous or come from elsewhere."""
        if _LONG_NUMBER.search(pattern) or _NESTED_SPECIFICATION.search(pattern):
            raise BudgetError(f"it formats with {pattern[:40]!r}, expected widths of at most 5 digits")

    def check_growth(self, name: str, text: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """Refuse a call of a string's method, or the filter of its name, that makes much from little.

        Returns the arguments, of which an iterator has become a list.
        """
        if name == "replace" and len(arguments) >= 2 and all(isinstance(a, str) for a in (text, *arguments[:2])):
            self.check(len(text) + text.count(arguments[0]) * len(arguments[1]))
        elif name == "join" and arguments:
            parts = list(self.counted(arguments[0]))
            self.weigh(parts)
            self.check(sum(len(part) for part in parts if isinstance(part, str)) + len(parts) * len(str(text)))
            return (parts, *arguments[1:])
        elif name == "indent" and isinstance(text, str) and arguments:
            width = arguments[0] if isinstance(arguments[0], int) else len(str(arguments[0]))
            self.check(len(text) + (text.count("\n") + 1) * width)
        elif name in ("format", "format_map", "strftime") and isinstance(text, str):
            self.check_format(text)
        elif name == "expandtabs" and isinstance(text, str):
            self.check(len(text) + text.count("\t") * (arguments[0] if arguments else 8))
        elif name in ("encode", "translate") and isinstance(text, str):
            raise BudgetError(f"it uses {name}, which no template needs")
        return arguments


class _Metered(NodeTransformer):
    """Puts a call of the environment around every expression whose cost the sandbox does not see."""

    def _around(self, name: str, node: Any) -> nodes.Expr:
        method = nodes.EnvironmentAttribute(name, lineno=node.lineno)
        return nodes.Call(method, [node], [], None, None, lineno=node.lineno)

    def get_visitor(self, node: nodes.Node) -> Any:
        """The method for a node, by its class; None leaves the node, but goes through what is in it."""
        methods: dict[type[nodes.Node], Callable[[Any], nodes.Node]] = {
            nodes.For: self._loop,
            nodes.Concat: self._concat,
            nodes.Compare: self._compare,
            nodes.Getitem: self._slice,
            **dict.fromkeys((nodes.List, nodes.Tuple, nodes.Dict), self._container),
        }
        return methods.get(type(node))

    def _loop(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = self._around("counted", node.iter)
        return node

    def _concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return self._around("joined", nodes.List(node.nodes, lineno=node.lineno))

    def _compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        node.expr = self._around("weighed", node.expr)
        for operand in node.ops:
            operand.expr = self._around("weighed", operand.expr)
        return node

    def _slice(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        sliced = isinstance(node.arg, nodes.Slice) and node.ctx == "load"
        return self._around("weighed", node) if sliced else node

    def _container(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        stored = getattr(node, "ctx", "load") != "load"
        return node if stored else self._around("weighed", node)


class Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's words for training; here it is its body and nothing more."""

    tags = {"generation"}  # noqa: RUF012  as the base class has it

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """What transformers lets chat templates use, in a sandbox, with a budget for one rendering."""

    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "%", "**"])

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self.counted, self.weighed, self.joined = own = budget.counted, budget.weigh, self._joined
        self._own = own  # what _Metered has put into the template
        extensions = [Generation, jinja2.ext.loopcontrols]
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=extensions, optimized=False, finalize=budget.weigh
        )
        self.concat = self._concat  # type: ignore[method-assign]
        self.filters = {name: self._metered(name, self.filters[name]) for name in _FILTERS}
        self.filters["tojson"] = self._to_json
        self.tests = {name: self._metered(name, test) for name, test in self.tests.items()}
        self.globals = {name: self.globals[name] for name in ("range", "dict", "cycler", "joiner", "namespace")}
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": self._strftime_now}

    def render(self, template: str, **names: Any) -> str:
        """The text of a template. Raises whatever a template can."""
        if len(template) > _LONGEST_TEMPLATE:
            raise BudgetError(f"it has {len(template):,} characters, expected at most {_LONGEST_TEMPLATE:,}")
        return self.from_string(template).render(**names)

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        return super()._generate(_Metered().visit(source).set_environment(self), *args, **kwargs)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805  keywords are the template's
        self, budget = __self, __self.budget
        budget.pay(1)
        if any(__obj is own for own in self._own):
            return __obj(*args)
        for value in (*args, *kwargs.values()):
            budget.weigh(value)
        owner = getattr(getattr(__obj, "__wrapped__", __obj), "__self__", None)  # the sandbox wraps str.format
        if isinstance(__obj, LoopContext) and args:  # the next level of a recursive loop
            args = (budget.counted(args[0]), *args[1:])
        elif isinstance(owner, (str, bytes, int, float)):
            budget.check_numbers((*args, *kwargs.values()))
            args = budget.check_growth(getattr(__obj, "__name__", ""), owner, args)
        return budget.weigh(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        budget = self.budget
        budget.pay(1)
        numbers = isinstance(left, int) and isinstance(right, int)
        if operator == "*" and numbers:
            self._check_bits(left.bit_length() + right.bit_length())
        elif operator == "**" and numbers:
            self._check_bits(left.bit_length() * abs(right))
        elif operator == "*":
            for times, sequence in ((left, right), (right, left)):
                if isinstance(times, int) and isinstance(sequence, Sized):
                    budget.check(max(times, 0) * len(sequence))
                    budget.pay(max(times, 0) * len(sequence) // _STEP_CHARACTERS)
        elif operator == "%" and isinstance(left, str):
            budget.check_format(left)
            budget.weigh(right)
        elif operator == "+" and isinstance(left, Sized) and isinstance(right, Sized):
            budget.check(len(left) + len(right))
        return budget.weigh(super().call_binop(context, operator, left, right))

    def _check_bits(self, bits: int) -> None:
        if bits > _LARGEST_INTEGER:
            raise BudgetError(f"it makes an integer of {bits:,} bits")

    def getattr(self, obj: Any, attribute: str) -> Any:
        self.budget.pay(1)
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        self.budget.weigh(argument)
        return super().getitem(obj, argument)

    def _joined(self, values: list[Any]) -> str:
        """The operator ~."""
        return self._concat(str(value) for value in self.budget.weigh(values))

    def _concat(self, parts: Iterable[str]) -> str:
        """Output to text: of a template, a macro or a block that is assigned."""
        found, size = [], 0
        for part in parts:
            size += len(part)
            self.budget.check(size)
            self.budget.pay(1 + len(part) // _STEP_CHARACTERS)
            found.append(part)
        return "".join(found)

    def _metered(self, name: str, function: Any) -> Callable[..., Any]:
        """A filter or test that pays for what it is given and what it returns."""
        first = 1 if hasattr(function, "jinja_pass_arg") else 0  # the value comes after a context or an environment

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            budget, given = self.budget, args[first:]
            if name in _SIZED:
                budget.check_numbers((*given[1:], *kwargs.values()))
            for value in (*given, *kwargs.values()):
                budget.weigh(value)
            if name == "join":
                separator = given[1] if len(given) > 1 else kwargs.get("d", "")
                given = (*budget.check_growth(name, separator, given[:1]), *given[1:])
            elif given:
                named = {"replace": ("old", "new"), "indent": ("width",)}.get(name, ())
                values = (*given[1:], *(kwargs[key] for key in named if key in kwargs))
                budget.check_growth(name, given[0], values)
            result = budget.weigh(function(*args[:first], *given, **kwargs))
            return result if isinstance(result, Sized) else budget.counted(result)

        return call

    def _to_json(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        """As in transformers: Jinja's own escapes HTML."""
        sizes = [len(each) if isinstance(each, str) else each for each in (indent, *(separators or ()))]
        if any(isinstance(size, int) and size > 64 for size in sizes):
            raise BudgetError("it indents or separates JSON by more than 64 characters")
        value = self.budget.weigh(value)
        text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
        return str(self.budget.weigh(text))

    def _strftime_now(self, form: str) -> str:
        self.budget.check_format(form)
        return datetime.now().strftime(form)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
