"""How the site shows an exported definition: signature, docstring, and a table of the docments.

nbdev's own renderer puts docments into the signature as comments, and loses them for dataclasses:
the shell that makes the docs defines those anew, where they have no source file to read comments
from.
"""

import re
from dataclasses import is_dataclass
from importlib import import_module
from inspect import Parameter, formatannotation, isclass
from typing import get_type_hints

from fastcore.docments import DocmentTbl, docments
from nbdev.showdoc import BasicMarkdownRenderer

from medmcqa_lora._modidx import d as index

EMPTY = Parameter.empty


def short(types: str) -> str:
    """torch.nn.modules.module.Module is Module."""
    return re.sub(r"\b[\w.]+\.(?=[A-Z])", "", types)


def from_package(cls: type) -> type:
    """The package's own copy of a class that the docs' shell has defined."""
    return next(
        (
            getattr(import_module(m), cls.__name__)
            for m, names in index["syms"].items()
            if f"{m}.{cls.__name__}" in names
        ),
        cls,
    )


def table(sym) -> str:
    made = DocmentTbl(sym)
    for base in (
        sym.__mro__ if is_dataclass(sym) else ()
    ):  # fields of the classes that it is put together from
        for name, text in (docments(base) if is_dataclass(base) else {}).items():
            if text and name in made.dm:
                made.dm[name].docment = text
    plain = get_type_hints(sym) if is_dataclass(sym) else {}  # types without pydantic's bounds
    for name, p in made.dm.items():
        p.anno = plain.get(name, p.anno)
        p.anno = p.anno if p.anno is EMPTY else f"`{short(formatannotation(p.anno))}`"
        p.default = p.default if p.default is EMPTY else f"`{p.default!r}`"
    return made._repr_markdown_()


class DocTable(BasicMarkdownRenderer):
    def _repr_markdown_(self) -> str:
        fields = isclass(self.sym) and is_dataclass(self.sym)
        rows = table(from_package(self.sym) if fields else self.sym)
        for p in getattr(self.dm, "dm", {}).values() if rows else ():
            p.docment = None  # they stand in the table
        head, fence, rest = super()._repr_markdown_().partition("```python\n")
        signature, end, rest = rest.partition("```")
        signature = (
            f"class {self.nm}\n" if fields else short(signature)
        )  # fields stand in the table
        return f"{head}{fence}{signature}{end}{rest}\n\n{rows}"
