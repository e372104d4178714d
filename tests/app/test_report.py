"The report: of finished and unfinished runs, with names that would like to be code, and in a browser."
import json, shutil
from html.parser import HTMLParser
import pytest
from autounet_nb.core.errors import InputError
from autounet_nb.core.files import write_json
from autounet_nb.planning.planner import make_plan
from autounet_nb.planning.rules import sketch_fingerprint
from autounet_nb.app.report import report

EVIL, IMG = '<script>alert(1)</script>', '<img src=x onerror=alert(1)>'

class Page(HTMLParser):
    "Fails where tags are not balanced, or where a browser would fetch or run something"
    def __init__(self, path):
        super().__init__()
        self.open, self.ids, self.pictures, self.words, self.raw = [], set(), 0, [], path.read_text(encoding='utf-8')
        assert path.stat().st_size < 5e6
        self.feed(self.raw); self.close()
        assert self.open == [] and not [p for p in path.parent.iterdir() if p.name.endswith('report.html') and p != path]
        self.text = ' '.join(' '.join(self.words).split())
    def handle_starttag(self, tag, attrs):
        assert tag not in ('script', 'iframe', 'object', 'embed', 'link', 'base', 'form'), tag
        for k, v in attrs:
            assert not k.startswith('on') and k != 'srcset'
            if k in ('src', 'href'): assert v.startswith('data:image/' if tag == 'img' else '#'), v[:60]
            if k == 'href': self.ids.add(v[1:])
        self.pictures += tag == 'img'
        if tag not in ('meta', 'img', 'br', 'hr'): self.open.append(tag)
    def handle_endtag(self, tag): assert self.open.pop() == tag
    def handle_data(self, data):
        if self.open and self.open[-1] == 'style': assert 'url(' not in data and '@import' not in data
        else: self.words.append(data)

@pytest.fixture
def work(trained, tmp_path):
    "A copy of a finished work folder"
    shutil.copytree(trained/'work', tmp_path/'work')
    return tmp_path/'work'

def told(work, **kw):
    p = Page(report(work, **kw))
    assert 'could not be made' not in p.text, p.text[p.text.index('could not be made'):][:300]
    return p

def test_a_finished_run_ends_with_it(trained):
    "It is there, and tells each thing that was asked for"
    p = Page(trained/'work'/'report.html')
    assert 'could not be made' not in p.text and p.pictures >= 9
    choice, plan = (json.loads((trained/'work'/f).read_text()) for f in ('ensemble.json', 'plan.json'))
    for words in ('--folds 0 --steps 30 --seed 0 --hardware cpu', f'{"+".join(choice["models"])} is chosen', f'{choice["margin"]:.3f} ahead', f'{choice["table"][0]["dice"]:.3f}', 'torch 2', 'Python 3', '2 of 2 trainings done', 'Worst: phantom_',
                  plan['reasons']['3d.patch_size']['because'], 'Nothing was set by hand', 'nothing is wrong', 'HD95', 'How far prediction and truth overlap', 'autounet predict'): assert words in p.text, words
    assert p.ids == {'made', 'data', 'plan', 'trainings', 'curves', 'scores', 'cases', 'choice', 'predict'} and all(f'id="{i}"' in p.raw for i in p.ids)

def test_the_numbers_are_those_of_the_scores(work):
    "Mean, sd and median of HD95 over the held-out cases, by hand"
    write_json(work/'ensemble.json', json.loads((work/'ensemble.json').read_text()) | dict(models=['3d']))
    scores = json.loads((work/'models/3d/fold_0/validation/scores.json').read_text())
    for name in scores['classes']:
        v = [c[name]['hd95'] for c in scores['cases'] if c[name]['hd95'] is not None]
        mean = sum(v) / len(v)
        sd = (sum((x - mean)**2 for x in v) / max(1, len(v) - 1))**.5
        if len(v) > 1: assert f'{mean:.2f} ± {sd:.2f}' in told(work).text

def test_only_a_plan(tmp_path, autounet):
    fp = sketch_fingerprint((20, 60, 50), classes=2)
    fp.save(tmp_path/'fingerprint.json'); make_plan(fp, 'cpu', {'3d.batch_size': 3}).save(tmp_path/'plan.json')
    p = autounet('report', tmp_path)
    assert p.returncode == 0 and p.stdout.strip() == str(tmp_path/'report.html') and p.stderr == ''
    p = told(tmp_path)
    for words in ('No training has begun', 'not been checked', 'Nothing was chosen yet', 'no trained model yet', 'no command to repeat', '3d.batch_size=3', 'no pictures of the scans'): assert words in p.text, words

def test_one_fold_is_trained_and_one_failed(work):
    "Before the choice: the states, the error and its trace, the scores so far"
    (work/'ensemble.json').unlink(); shutil.rmtree(work/'cross_validation')
    shutil.rmtree(work/'models/3d/fold_0')
    write_json(work/'models/3d/fold_0/failed.json', dict(error=f'RuntimeError: out of memory {EVIL}', trace='Traceback: where it was'))
    p = told(work)
    for words in ('1 of 2 trainings done', '1 failed', 'RuntimeError: out of memory', 'Traceback: where it was', 'These are the scores so far', 'All metrics of 2d', 'Nothing was chosen yet', 'Worst: phantom_'): assert words in p.text, words

def test_a_run_in_which_a_training_fails_still_reports(autounet, trained, tmp_path):
    for d in ('scans', 'work'): shutil.copytree(trained/d, tmp_path/d)
    (tmp_path/'work/report.html').unlink()
    case = json.loads((tmp_path/'work/splits.json').read_text())[1]['valid'][0]
    for f in (tmp_path/'work/prep').glob(f'*/{case}_label.b2nd'): f.write_bytes(b'nonsense')
    p = autounet('run', tmp_path/'scans', tmp_path/'work', '--models', '3d', '--folds', '0,1', '--steps', '30')
    assert p.returncode == 1 and 'report so far' in p.stdout and 'trainings failed' in p.stderr
    assert 'failed' in Page(tmp_path/'work/report.html').text

def test_names_are_never_code(work):
    "A class and a case that are called like tags, in every file; dollars, which matplotlib reads as formulas"
    for f in work.rglob('*.json'): f.write_text(f.read_text().replace('organ', EVIL).replace('lesion', '$\\\\frac$ & co').replace('phantom_00', IMG.replace('"', '') + '_00'))
    p = told(work)
    assert EVIL in p.text and IMG in p.text and '$\\frac$ & co' in p.text # as words

def test_scans_that_are_gone_and_files_that_are_damaged(work):
    "A sentence for each, and the rest of the page"
    cases = json.loads((work/'cases.json').read_text())
    for c in cases['cases']: c['images'] = ['/gone/' + i.rpartition('/')[2] for i in c['images']]
    write_json(work/'cases.json', cases | dict(root='/gone'))
    p = told(work)
    assert 'cannot be shown: case phantom_' in p.text and 'no pictures of the scans' in p.text and 'read by patterns' in p.text
    (work/'plan.json').write_text('{"version": 1'); (work/'models/2d/fold_0/validation/scores.json').write_text('{"mean": 1}'); (work/'models/3d/fold_0/history.csv').write_text('a,b\n1,x\n')
    p = told(work)
    for words in ('plan.json: this is no valid JSON', 'is damaged', 'Nothing has been planned yet', 'All metrics of'): assert words in p.text, words
    for f, text in (('ensemble.json', '[1]'), ('check.json', '{}'), ('run.json', '7'), ('fingerprint.json', 'null')): (work/f).write_text(text)
    Page(report(work)) # whatever they hold, there is a page

def test_nothing_to_report(autounet, one_line, tmp_path):
    one_line(autounet('report', tmp_path), 'nothing to report on')
    with pytest.raises(InputError): report(tmp_path/'nowhere')
    assert not (tmp_path/'nowhere').exists()

def test_the_page_in_a_browser(trained, tmp_path):
    "No errors, nothing fetched, no wider than a desk or a phone, light and dark"
    path = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
    if not path: pytest.skip('there is no browser to test the page with')
    from playwright.sync_api import sync_playwright
    with sync_playwright() as play:
        browser, said = play.chromium.launch(executable_path=path, args=['--no-sandbox', '--disable-background-networking']), []
        for width, scheme in ((1280, 'light'), (1280, 'dark'), (360, 'dark')):
            tab = browser.new_page(viewport=dict(width=width, height=900), color_scheme=scheme)
            tab.on('console', lambda m: said.append(m.text)); tab.on('pageerror', lambda e: said.append(str(e)))
            tab.on('request', lambda r: r.url.startswith(('file:', 'data:')) or said.append(r.url))
            tab.goto((trained/'work'/'report.html').as_uri())
            assert tab.evaluate('document.documentElement.scrollWidth') <= width
            assert tab.evaluate('[...document.images].every(i => i.complete && i.naturalWidth > 100)')
            ink, paper = tab.evaluate('[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor].map(c => c.match(/\\d+/g).reduce((a, b) => a + +b, 0))')
            assert (paper > ink + 300) if scheme == 'light' else (ink > paper + 300)
            tab.locator('summary').last.click()
            tab.screenshot(path=tmp_path/f'{width}_{scheme}.png', full_page=True)
        browser.close()
    assert said == []
