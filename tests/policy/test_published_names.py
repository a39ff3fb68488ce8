# SPDX-License-Identifier: MIT
"""Every published name is there with its signature, or docs/compatibility.md says why it is not."""

import inspect

from tests.policy.published_api import PAGE, differences, documented, entries, find, matching


def test_a_published_name_is_there_or_its_absence_is_explained():
    reasons = documented("Not there")
    unexplained, used, found, all_names = [], set(), set(), set()
    for module, name, _ in entries():
        all_names.add((module, name))
        patterns = matching(reasons, module, name)
        if find(module, name) is not None:
            found.add((module, name))
            stale = [p for p in patterns if "*" not in p]
            assert not stale, f"{module}.{name} is there, but the page says why it is not"
        elif not patterns:
            unexplained.append(f"{module}.{name}")
        used.update(patterns if find(module, name) is None else ())
    assert not unexplained
    assert used == set(reasons), f"rows without a name: {set(reasons) - used}"
    names = {name for _, name in all_names}
    missing = {name for module, name in all_names - found}
    assert (
        f"{len(names) - len(missing)} of {len(names)} published names are there, at {len(found)} of "
        f"{len(all_names)} places"
    ) in " ".join(PAGE.read_text().split())


def test_a_published_call_runs_or_its_difference_is_explained():
    reasons = documented("Different")
    wrong, explained, checked = [], set(), {}
    for module, name, signature in entries():
        ours = find(module, name)
        if ours is None or signature is None:
            continue
        said = differences(ours, signature)
        checked[name] = checked.get(name, True) and not said
        patterns = matching(reasons, module, name)
        explained.update(patterns if said else ())
        if said and not patterns:
            wrong.append(f"{module}.{name}: {'; '.join(said)}")
    assert not wrong, "\n".join(wrong)
    assert explained == set(reasons), f"rows without a difference: {set(reasons) - explained}"
    alike = sum(checked.values())
    assert f"{alike} of {len(checked)} signatures" in " ".join(PAGE.read_text().split())


def test_a_difference_would_be_noticed():
    def ours(q, v, scale=1.0, k=None): ...

    def published(q, k, v, scale=None, g=None): ...

    assert differences(ours, inspect.signature(published)) == [
        "k is elsewhere", "v is elsewhere", "scale is elsewhere",
        "scale=1.0, published None", "no g",
    ]  # fmt: skip
