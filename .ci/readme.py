"Writes README.md from nbs/index.ipynb: nbdev processes the notebook, nbconvert turns it into Markdown, pictures go to nbs/images."

from pathlib import Path
from nbconvert import MarkdownExporter
from nbdev.serve import proc_nbs
import nbformat, re, shutil

if __name__ == '__main__':
    root = Path(__file__).resolve().parent.parent
    cache = proc_nbs(str(root / 'nbs'), file_glob='index.ipynb', force=True, n_workers=0)
    nb = nbformat.read(cache / 'index.ipynb', as_version=4)
    title = (
        nbformat.read(root / 'nbs' / 'index.ipynb', as_version=4).cells[0].source
    )  # which nbdev takes for front matter
    text, resources = MarkdownExporter().from_notebook_node(nb, {'output_files_dir': 'nbs/images'})
    images = root / 'nbs' / 'images'
    images.mkdir(exist_ok=True)
    for old in images.glob('output_*.png'):
        old.unlink()
    for name, data in resources.get('outputs', {}).items():
        (root / name).write_bytes(data)
    text = re.sub(r'\n{3,}', '\n\n', re.sub(r'\A---\n.*?\n---\n|<!-- WARNING.*?-->', '', text, flags=re.S))
    text = re.sub(r' style="[^"]*"', '', text)  # GitHub drops it
    text = re.sub(r'\]\((?!http|nbs/)([\w/]+\.ipynb|images/\w+\.png)\)', r'](nbs/\1)', text)
    (root / 'README.md').write_text(
        '<!-- written by .ci/readme.py from nbs/index.ipynb -->\n' + title + '\n\n' + text.strip() + '\n',
        encoding='utf-8',
    )
    shutil.rmtree(cache, ignore_errors=True)
