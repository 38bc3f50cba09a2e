"""Compile the table of figures with the installed Triton and write it beside the committed ones.

python -m tests.codegen.update
"""

from fqt_bench.codegen.table import ARCHES, FIGURES, compile_table


def main() -> None:
    FIGURES.mkdir(exist_ok=True)
    table = compile_table()
    committed = table.committed()
    for arch in ARCHES:
        if committed is not None and (difference := table.difference(committed, arch)):
            print(difference)
    table.write()
    print(f"{table.path.name}: {len(table.entries)} entries")


if __name__ == "__main__":
    main()
