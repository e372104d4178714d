"""How readable the code is, in numbers, and the limit of each. Fails where a number is above its limit.

`python .ci/limits.py` prints the table; `python .ci/limits.py --where` also says where the worst places are.
"""

import ast, json, subprocess, sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE, NOTEBOOKS = ROOT / 'autounet_nb', ROOT / 'nbs'
LINE = 120  # characters
COMPLEX = 10
PARAMETERS = 6
MODULES = sorted(
    p for p in PACKAGE.rglob('*.py') if p.name not in ('_modidx.py', '__init__.py', '__main__.py', 'all.py')
)


def exported_lines(path):
    "(number, line) of a module for every line of its notebook that is not empty; what nbdev writes above them is left out"
    lines = list(enumerate(path.read_text(encoding='utf-8').splitlines(), 1))
    first = next((i for i, line in lines if line.startswith('# %% ..')), 0)
    return [(i, line) for i, line in lines if i > first and line.strip() and not line.startswith('# %%')]


def long_lines():
    return [f'{name(p)}:{i}' for p in MODULES for i, l in exported_lines(p) if len(l) > LINE]


def complexity(function):
    "Ways through a function: one, and one more for each branch, loop, condition and comprehension"
    n = 1
    for x in ast.walk(function):
        n += isinstance(x, (ast.If, ast.IfExp, ast.For, ast.While, ast.ExceptHandler, ast.Assert))
        if isinstance(x, ast.BoolOp):
            n += len(x.values) - 1
        if isinstance(x, ast.comprehension):
            n += 1 + len(x.ifs)
    return n


def complex_functions():
    found = [
        (complexity(f), f'{name(p)}.{f.name}')
        for p, t in trees()
        for f in ast.walk(t)
        if isinstance(f, ast.FunctionDef)
    ]
    return [f'{f} {n}' for n, f in sorted(found, reverse=True) if n > COMPLEX]


def trees():
    for p in MODULES:
        yield p, ast.parse(p.read_text(encoding='utf-8'))


def ternaries():
    "Ternaries in a thousand lines"
    found = [(p, n) for p, t in trees() for n in ast.walk(t) if isinstance(n, ast.IfExp)]
    lines = sum(len(exported_lines(p)) for p in MODULES)
    return 1000 * len(found) / lines, [f'{name(p)}: {n}' for p, n in Counter(p for p, _ in found).most_common()]


def many_parameters():
    "Functions with more parameters than a reader can hold; constructors whose parameters all have a comment are none"
    res = []
    for p, t in trees():
        lines = p.read_text(encoding='utf-8').splitlines()
        for f in ast.walk(t):
            if not isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            a = [x for x in (*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs) if x.arg not in ('self', 'cls')]
            documented = f.name == '__init__' and all('#' in lines[x.lineno - 1] for x in a)
            if len(a) > PARAMETERS and not documented:
                res.append(f'{name(p)}.{f.name} {len(a)}')
    return res


def names_of_all():
    "Names that `from autounet_nb.all import *` brings"
    code = 'import autounet_nb.all as a; print(len(getattr(a, "__all__", [n for n in dir(a) if n[0] != "_"])))'
    return int(subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout)


def writes_cells(node):
    "Whether a part of the code writes cells of a table: markup, a rule of Markdown, or columns padded with spaces"
    if isinstance(node, ast.Attribute):
        return node.attr == 'ljust'
    text = node.value if isinstance(node, ast.Constant) else ''
    return isinstance(text, str) and any(mark in text for mark in ('<td', '<tr', '| --- |'))


def table_writers():
    "Functions outside of the one table that write a table themselves"
    functions = [(p, f) for p, t in trees() if p.stem != 'table' for f in ast.walk(t) if isinstance(f, ast.FunctionDef)]
    return [f'{name(p)}.{f.name}' for p, f in functions if any(map(writes_cells, ast.walk(f)))]


def source(cell):
    return ''.join(cell['source'])


def prose():
    "Words of prose per exported line, the poorest notebook first"
    res = []
    for p in NOTEBOOKS.rglob('*.ipynb'):
        cells = json.loads(p.read_text(encoding='utf-8'))['cells']
        exported = [source(c) for c in cells if c['cell_type'] == 'code' and source(c).startswith('#| export')]
        lines = sum(bool(line.strip()) for s in exported for line in s.splitlines()[1:])
        words = sum(len(source(c).split()) for c in cells if c['cell_type'] == 'markdown')
        if lines > 5:
            res.append((words / lines, p.stem))
    return sorted(res)


def name(path):
    return '.'.join(path.relative_to(PACKAGE).with_suffix('').parts)


def rows():
    "(what, number, limit, worst places)"
    long, hard, (ifs, where), wide, writers = (
        long_lines(),
        complex_functions(),
        ternaries(),
        many_parameters(),
        table_writers(),
    )
    folders = Counter(p.parent.name for p in MODULES).most_common()
    sizes = sorted(((len(exported_lines(p)), name(p)) for p in MODULES), reverse=True)
    poorest = prose()
    yield f'lines longer than {LINE} characters', len(long), 0, long
    yield f'functions with a complexity above {COMPLEX}', len(hard), 0, hard
    yield 'ternaries in 1,000 lines', round(ifs, 1), 25, where
    yield f'functions with more than {PARAMETERS} parameters', len(wide), 0, wide
    yield 'names from autounet_nb.all', names_of_all(), 80, []
    yield 'modules in one folder', folders[0][1], 10, [f'{f}: {n}' for f, n in folders]
    yield 'exported lines of the longest module', sizes[0][0], 250, [f'{m}: {n}' for n, m in sizes]
    yield 'functions that write a table themselves', len(writers), 0, writers
    yield (
        'words of prose per exported line, poorest notebook',
        round(poorest[0][0], 1),
        4,
        [f'{n}: {w:.1f}' for w, n in poorest],
    )


def main():
    failed = False
    for what, number, limit, where in rows():
        least = what.startswith('words')  # the only number that has to be large
        bad = number < limit if least else number > limit
        failed |= bad
        print(f'{what:52}{number:>7}  {"≥" if least else "≤"} {limit}{"  BEYOND ITS LIMIT" * bad}')
        if '--where' in sys.argv:
            print(*(f'    {w}' for w in where[:20]), sep='\n')
    sys.exit(failed)


if __name__ == '__main__':
    main()
