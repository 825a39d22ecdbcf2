"""Requests that schemathesis invents from /openapi.json, and what must hold of every answer.

Invented ids are ids of nothing: most of them are replaced with ids that are there, in paths, in addresses and in bodies.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import schemathesis
from hypothesis import HealthCheck, Phase, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance, status_code_conformance

MOSTLY = st.sampled_from([True, True, True, False])
CHECKS = [status_code_conformance, content_type_conformance, response_schema_conformance]


def invent(
    url: str,
    key: str,
    many: int,
    wanted: Callable[[str], bool],
    known: Callable[[], Mapping[str, Sequence[str]]] = dict,
) -> Counter[tuple[str, int]]:
    """Ask every operation whose path is `wanted` this many times with bodies and parameters of its shape, and as often with
    others. `known`: values that mean something now, by the name of a parameter.

    Returns how often each operation gave each status.

    Raises:
        AssertionError: an answer is a 5xx, or another one than described.
    """
    schema = schemathesis.openapi.from_url(url.removesuffix("/v1") + "/openapi.json")
    told: Counter[tuple[str, int]] = Counter()
    wrong: list[str] = []
    for result in schema.get_all_operations():
        operation = result.ok()
        if not wanted(operation.path):
            continue
        for mode in GenerationMode:

            @examples(
                max_examples=many,
                deadline=None,
                suppress_health_check=list(HealthCheck),
                phases=[Phase.explicit, Phase.generate],
                database=None,
            )
            @given(case=operation.as_strategy(mode), data=st.data())
            def holds(case: Any, data: st.DataObject) -> None:
                there = known()
                for place in (case.path_parameters, case.query, case.body):
                    for name in place if isinstance(place, dict) else ():
                        if there.get(name) and data.draw(MOSTLY, name):
                            place[name] = data.draw(st.sampled_from(there[name]), f"{name} that is there")
                response = case.call(headers={"authorization": f"Bearer {key}"}, timeout=60)
                told[f"{case.method} {case.operation.path}", response.status_code] += 1  # noqa: B023
                assert response.status_code < 500, response.content
                case.validate_response(response, checks=CHECKS)

            try:
                holds()
            except Unsatisfiable:
                assert mode == GenerationMode.NEGATIVE, operation.path  # nothing can be wrong with a request without parameters
            except Exception as error:  # schemathesis and hypothesis raise groups; every operation is asked
                wrong.append("".join(traceback.format_exception_only(error)) + str(getattr(error, "exceptions", "")))
    assert not wrong, "\n".join(wrong)
    return told
