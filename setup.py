"Reads everything that describes the package from settings.ini, and its version from autounet_nb/__init__.py."
from configparser import ConfigParser
from pathlib import Path
import re
from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=['='])
config.read(here/'settings.ini', encoding='utf-8')
cfg = config['DEFAULT']

repository = cfg['repository'].rstrip('/')
urls = dict(Source=repository, Issues=f'{repository}/issues', Changelog=f'{repository}/blob/main/CHANGELOG.md') if repository else {}

setup(
    name=cfg['lib_name'],
    version=re.search(r'__version__ = "(.+?)"', (here/cfg['lib_name']/'__init__.py').read_text())[1],
    description=cfg['description'],
    long_description=(here/'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    author=cfg['author'], license=cfg['license'], keywords=cfg['keywords'],
    classifiers=[
        'Development Status :: 4 - Beta',
        'Framework :: Jupyter',
        'Intended Audience :: Education',
        'Intended Audience :: Healthcare Industry',
        'Intended Audience :: Science/Research',
        'Operating System :: OS Independent',
        'Programming Language :: Python :: 3',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
        'Topic :: Scientific/Engineering :: Image Processing',
        'Topic :: Scientific/Engineering :: Medical Science Apps.',
        'Typing :: Typed',
    ],
    project_urls=urls,
    package_data={cfg['lib_name']: ['py.typed']},
    packages=find_packages(include=[cfg['lib_name'], f"{cfg['lib_name']}.*"]),
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg['requirements'].split(),
    extras_require={extra: cfg[f'{extra}_requirements'].split() for extra in ('dev', 'explore', 'cluster', 'multigpu', 'docs')},
    entry_points={'console_scripts': [cfg['console_scripts']], 'nbdev': [f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"]},
)
