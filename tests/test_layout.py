"""What the folder layout promises: the name `kernels` stays free, and imports point one way."""

import ast
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run_python(code: str, cwd: Path, **environment: str) -> None:
    inherited = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_kernels_is_a_folder_and_not_a_package():
    # transformers imports whatever is importable as `kernels`, in the belief that it is Hugging
    # Face's package of that name. Of a folder without __init__.py it takes no notice.
    assert not (ROOT / "kernels" / "__init__.py").exists()
    modules = {path.relative_to(ROOT / "kernels").parts[0] for path in ROOT.glob("kernels/**/*.py")}
    assert modules == {"quant_kernels"}


def test_transformers_imports_from_the_root_of_the_checkout():
    # With -c the working directory comes first on sys.path. The model class pulls in
    # transformers' integrations, which is where `kernels` would be imported.
    run_python("from transformers import PreTrainedModel", cwd=ROOT)


def test_quant_kernels_imports_without_quant(tmp_path):
    code = """
import sys
sys.modules["quant"] = None  # from here on, `import quant` is an ImportError
import quant_kernels.cpu, quant_kernels.cuda, quant_kernels.native
"""
    run_python(code, cwd=tmp_path, PYTHONPATH=str(ROOT / "kernels"))


def test_quant_kernels_never_names_quant():
    for path in (ROOT / "kernels" / "quant_kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            else:
                continue
            imported = {name.partition(".")[0] for name in names}
            assert "quant" not in imported, f"{path.relative_to(ROOT)}:{node.lineno}"
