"The plan explorer: its state without a browser, the page in a real one, and what the page refuses."
import asyncio, json, os, shutil, signal, socket, subprocess, sys, uuid
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit
import pytest
from hypothesis import given, settings, strategies as st
from tornado.httpclient import HTTPClientError, HTTPRequest
from tornado.ioloop import IOLoop
from tornado.websocket import websocket_connect
import autounet_nb.planning.planner
from autounet_nb.core.errors import InputError
from autounet_nb.viz.choices import Choices
from autounet_nb.app.explorer import PlanExplorer
from autounet_nb.planning.plan import Plan
from autounet_nb.planning.planner import make_plan
from autounet_nb.planning.rules import sketch_fingerprint

def abdomen(): return sketch_fingerprint((96, 320, 280), (2.5, .8, .8), n=120, modalities=('T1', 'T2'), classes=2, name='Abdomen')

changes = st.one_of(st.tuples(st.sampled_from(['2d.batch_size', '3d.batch_size', '3d_lowres.batch_size', '3d.features_per_stage', 'cases', '3d.num_pool_per_axis']), st.integers(-1, 300)),
    st.tuples(st.just('3d_lowres.spacing'), st.lists(st.floats(0, 20), min_size=3, max_size=3)),
    st.tuples(st.just('3d.patch_size'), st.lists(st.integers(0, 400), min_size=3, max_size=3)), st.tuples(st.just('spacing'), st.lists(st.floats(0, 20), min_size=3, max_size=3)),
    st.tuples(st.just('cascade'), st.sampled_from(['yes', 'no', 'perhaps'])), st.tuples(st.just('hardware'), st.sampled_from(['cpu', 'gpu-12gb', '8GB', '0GB', 'abacus'])), st.tuples(st.just('clear'), st.just(None)))

@settings(max_examples=60, deadline=None)
@given(st.lists(changes, max_size=6))
def test_choices_are_what_make_plan_gives_or_one_sentence(steps):
    "Whatever is set in whatever order: the plan is that of the edits, or the last that worked and a reason"
    c, fp, hardware, edits = Choices(abdomen(), 'gpu-12gb'), abdomen(), 'gpu-12gb', {}
    for key, value in steps:
        before = c.plan
        if key == 'clear': c.clear(*c.edits); edits = {}
        else: c.set(key, value)
        if key == 'hardware': hardware = value
        elif key != 'clear': edits[key] = value
        try: expected = make_plan(fp, hardware, edits)
        except InputError as e: assert c.problem == str(e) and c.plan == before
        else: assert (c.problem, c.plan, c.automatic) == ('', expected, make_plan(fp, hardware))
    later = Choices(abdomen(), c.hardware if not c.problem else 'cpu', c.edits) # opened with the same edits
    if not c.problem: assert (later.plan, later.automatic, later.problem) == (c.plan, c.automatic, '')
    else: assert later.plan == make_plan(fp, 'cpu', c.edits) if not later.problem else later.plan == later.automatic == make_plan(fp, 'cpu')
    c.reset()
    assert (c.plan, c.edits, c.problem) == (make_plan(c.fingerprint, 'gpu-12gb'), {}, '')

def test_going_on_from_a_saved_plan(tmp_path):
    "Edits and hardware are those of the plan beside the fingerprint; reset makes everything automatic; other plans are no start"
    abdomen().save(tmp_path/'fingerprint.json')
    assert PlanExplorer(tmp_path, 'cpu').edits == {} and not (tmp_path/'plan.json').exists()
    saved = make_plan(abdomen(), '11GB', {'3d.patch_size': [30, 100, 100], '3d_lowres.spacing': [5, 4, 4], 'cases': 40, 'normalization': ['ct', 'nonzero'], '3d.features_per_stage': [8, 16, 32, 64, 128]})
    saved.save(tmp_path/'plan.json')
    for source in (tmp_path, tmp_path/'fingerprint.json', str(tmp_path)):
        e = PlanExplorer(source)
        assert e.plan == saved and e.edits == saved.edits and e.choices.automatic == make_plan(abdomen(), '11GB')
        shown = {k: (f.value, f.auto.value) for k, f in e.fields.items()}
        assert shown['3d.patch_size'] == ([30, 100, 100], False) and shown['3d_lowres.spacing'] == ([5, 4, 4], False) and shown['cases'] == (40, False) and shown['2d.batch_size'][1]
        assert (e.hardware.value, e.memory.value) == ('memory in GB', 11) and '<b>nothing</b>' in e.redo.value
    e.reset()
    assert (e.plan, e.edits) == (make_plan(abdomen(), '11GB'), {}) and all(f.auto.value for f in e.fields.values())
    assert PlanExplorer(tmp_path, 'gpu-12gb').plan == make_plan(abdomen(), 'gpu-12gb', saved.edits)
    assert PlanExplorer(tmp_path, 'cpu', tmp_path/'other.json').edits == {}
    no_room = PlanExplorer(tmp_path, '1GB')
    assert no_room.plan == make_plan(abdomen(), '1GB') and no_room.edits == saved.edits and no_room.choices.problem in no_room.message.value
    for other in (sketch_fingerprint((96, 320, 280), name='Abdomen'), sketch_fingerprint((9, 99, 99), modalities=('T1', 'T2'), classes=2, name='Elsewhere')):
        other.save(tmp_path/'fingerprint.json')
        assert PlanExplorer(tmp_path, 'cpu').edits == {}
    (tmp_path/'plan.json').write_text('{}')
    assert PlanExplorer(tmp_path, 'cpu').edits == {}

def test_the_first_stage_has_a_spacing_of_its_own():
    e = PlanExplorer(abdomen(), 'gpu-12gb')
    field = e.fields['3d_lowres.spacing']
    assert field.row not in e.model_fields.children and field.value == list(e.plan.models['3d_lowres'].spacing)
    e.model.value = '3d_lowres'
    assert e.model_fields.children[0] is field.row
    field.inputs[0].value = 7.5
    assert e.edits == {'3d_lowres.spacing': [7.5, *make_plan(abdomen(), 'gpu-12gb').models['3d_lowres'].spacing[1:]]} and e.plan.models['3d_lowres'].spacing[0] == 7.5
    assert '7.5×' in e.table.value and '(by hand)' in e.table.value and e.plan.models['3d'] == make_plan(abdomen(), 'gpu-12gb').models['3d']
    field.inputs[1].value = .1
    assert 'finer than the second stage, which has 2.5×0.8×0.8 mm; the nearest that works is 3d_lowres.spacing=7.5,0.8,' in e.message.value
    field.auto.value = True
    assert e.plan == make_plan(abdomen(), 'gpu-12gb') and '3d_lowres.spacing' not in PlanExplorer(sketch_fingerprint((1, 99, 99)), 'cpu').fields

def test_a_change_plans_once(monkeypatch):
    "Structure, not time: one plan per change, however many controls follow it"
    explorer, calls = PlanExplorer(abdomen(), 'gpu-12gb'), []
    decide = autounet_nb.planning.planner.decide
    monkeypatch.setattr(autounet_nb.planning.planner, 'decide', lambda *a, **kw: calls.append(a) or decide(*a, **kw))
    for change in (lambda: setattr(explorer.fields['3d.patch_size'].inputs[1], 'value', 96), lambda: setattr(explorer.cascade, 'value', 'no'), lambda: setattr(explorer.fields['3d.patch_size'].auto, 'value', True)):
        calls.clear(); change()
        assert len(calls) == 1
    calls.clear(); explorer.model.value = '3d'
    assert not calls

def test_what_follows_follows_and_what_was_set_stays():
    explorer = PlanExplorer(abdomen(), 'gpu-12gb')
    explorer.fields['3d.batch_size'].auto.value = False # holds what it shows
    assert explorer.edits == {'3d.batch_size': 2}
    explorer.fields['3d.patch_size'].inputs[0].value = 30
    assert explorer.edits['3d.patch_size'][0] == explorer.fields['3d.patch_size'].inputs[0].value == 30 and 'is padded to 32×' in explorer.message.value
    assert explorer.fields['3d.batch_size'].value == 2 and explorer.fields['3d.num_pool_per_axis'].value == list(explorer.plan.models['3d'].num_pool_per_axis)
    explorer.cascade.value = 'no'
    explorer.fields['cases'].inputs[0].value = 4
    assert explorer.edits['cases'] == 4 and explorer.fields['2d.batch_size'].value == explorer.plan.models['2d'].batch_size == make_plan(abdomen(), 'gpu-12gb', explorer.edits).models['2d'].batch_size
    assert '3d_lowres' in explorer.table.value or '3d_lowres' not in explorer.plan.models

def test_names_from_elsewhere_are_text():
    "A fingerprint may come from anybody, and its names are shown in a page"
    evil = '<img src=x onerror=alert(1)>'
    explorer = PlanExplorer(sketch_fingerprint((20, 40, 40), modalities=(evil, 'CT'), name=evil), 'cpu')
    explorer.explain()
    assert not [v for v in (explorer.title, explorer.message, explorer.table, explorer.why, explorer.redo, explorer.costs) if '<img' in v.value]

@contextmanager
def served(tmp_path, *words):
    "`autounet explore` on a generated fingerprint: the process, its address, the folder"
    abdomen().save(tmp_path/'fingerprint.json'); (tmp_path/'private').mkdir()
    words = [str(Path(sys.executable).with_name('autounet')), 'explore', *map(str, words), '--no-browser']
    p = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding='utf-8', cwd=tmp_path, env=os.environ | dict(TMPDIR=str(tmp_path/'private')))
    first = [p.stdout.readline().strip() for _ in range(2)]
    if not first[1].startswith('http://127.0.0.1:'): pytest.fail(f'{first} {p.communicate()}')
    yield p, first[1], tmp_path
    if p.poll() is None: p.terminate(); p.communicate(timeout=60)

@pytest.fixture
def page(tmp_path):
    with served(tmp_path, tmp_path/'fingerprint.json', '--hardware', 'gpu-12gb') as it: yield it

def ask(url, path, method='GET', token=None, host=None, cookie=None):
    "Status and body of one request"
    c = HTTPConnection(urlsplit(url).hostname, urlsplit(url).port, timeout=60)
    headers = {k: v for k, v in dict(Host=host, Cookie=cookie, Authorization=token and f'token {token}').items() if v}
    c.request(method, path, headers=headers)
    r = c.getresponse()
    return r.status, r.read().decode(errors='replace')

def closed(p, folder):
    "Ctrl-C ends it, without a word on stderr, and nothing of it is left"
    p.send_signal(signal.SIGINT)
    _, err = p.communicate(timeout=60)
    assert p.returncode == 0 and 'Traceback' not in err, err
    assert not [f for f in (folder/'private').iterdir() if f.name.startswith('autounet_')]

def test_the_page_serves_one_notebook_to_who_has_the_token(page):
    p, url, folder = page
    token = url.partition('token=')[2]
    assert ask(url, '/')[0] == 302 and ask(url, '/login')[0] == 403
    assert ask(url, '/?token=wrong')[0] in (302, 403)
    assert ask(url, '/', token=token, host='elsewhere.example')[0] == 403
    for path in ('/api/contents', '/api/contents/fingerprint.json', '/api/kernels', '/api/kernelspecs', '/api/sessions', '/api/terminals', '/terminals/1', '/tree', '/lab', '/files/fingerprint.json', '/fingerprint.json', '/explorer.json',
                 '/voila/files/fingerprint.json', '/voila/files/explorer.json', '/voila/files/Plan%20explorer.ipynb', '/voila/tree', '/voila/render/Plan%20explorer.ipynb', '/voila/static/..%2F..%2F..%2F..%2Fetc/passwd', '/voila/labextensions/..%2F..%2Fetc/passwd'):
        status, body = ask(url, path, token=token)
        assert status in (403, 404) and 'Abdomen' not in body and 'root:' not in body, path
    for path in ('/api/kernels', '/api/terminals'): assert ask(url, path, 'POST', token=token)[0] in (403, 404)
    closed(p, folder)

def test_only_this_machine_is_listened_to(page):
    p, url, folder = page
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.connect(('192.0.2.1', 9)) # sends nothing; says which address this machine has
        own = s.getsockname()[0]
    if own.startswith('127.'): pytest.skip('this machine has no address but the loopback one')
    with pytest.raises(OSError): socket.create_connection((own, urlsplit(url).port), timeout=5)
    socket.create_connection(('127.0.0.1', urlsplit(url).port), timeout=5).close()
    closed(p, folder)

def kernel_of(url):
    "Opens the page once, without a browser: the id of the process behind it"
    html = ask(url, '/', token=url.partition('token=')[2])[1]
    return html.partition('kernelId":')[2].strip().partition('"')[2].partition('"')[0]

async def talk(url, kernel, messages, **headers):
    "Sends messages to the process, and last an allowed one on each channel; what kinds of answers the others got until those were answered"
    ws = await websocket_connect(HTTPRequest(f'ws://127.0.0.1:{urlsplit(url).port}/api/kernels/{kernel}/channels?session_id=test', headers=headers))
    sent = {}
    for kind, content in (*messages, ('kernel_info_request', {})):
        for channel in ('shell', 'control'):
            header = dict(msg_id=uuid.uuid4().hex, msg_type=kind, session='test', username='', version='5.3', date='2020-01-01T00:00:00Z')
            sent[header['msg_id']] = kind
            await ws.write_message(json.dumps(dict(header=header, parent_header={}, metadata={}, content=content, channel=channel, buffers=[])))
    answers, open_ = [], 2
    while open_:
        m = json.loads(await asyncio.wait_for(ws.read_message(), 30))
        kind = sent.get((m.get('parent_header') or {}).get('msg_id'))
        if kind == 'kernel_info_request': open_ -= m['msg_type'] == 'kernel_info_reply'
        elif kind: answers.append((kind, m['msg_type']))
    ws.close()
    return answers

REFUSED = [('inspect_request', dict(code='x', cursor_pos=1)), ('complete_request', dict(code='x', cursor_pos=1)), ('history_request', dict(hist_access_type='tail', n=9)),
           ('debug_request', dict(command='evaluate')), ('interrupt_request', {}), ('shutdown_request', dict(restart=False))]

def test_a_visitor_cannot_run_code(page):
    p, url, folder = page
    token, kernel = url.partition('token=')[2], kernel_of(url)
    assert len(kernel) == 36
    say = lambda *a, **kw: IOLoop().run_sync(lambda: talk(url, kernel, *a, **kw))
    mine = dict(Authorization=f'token {token}')
    with pytest.raises(HTTPClientError) as e: say([]) # nobody without the token
    assert e.value.code in (302, 403)
    with pytest.raises(HTTPClientError): say([], Host='elsewhere.example', **mine)
    assert say([('comm_info_request', {})], **mine) # the way is open for what the page needs
    code = dict(code=f'open({str(folder/"run")!r}, "w").close()', silent=False, store_history=False, user_expressions={}, allow_stdin=False)
    assert say([('execute_request', code), *REFUSED], **mine) == []
    assert not (folder/'run').exists()
    assert ask(url, f'/api/kernels/{kernel}', 'DELETE', token=token)[0] in (403, 405)
    assert ask(url, f'/api/kernels/{kernel}', token=token)[0] == 200
    closed(p, folder)

def test_mistakes_get_one_sentence(autounet, one_line, tmp_path):
    one_line(autounet('explore', tmp_path/'no.json'), 'no.json')
    (tmp_path/'odd.json').write_text('{"a": 1}')
    one_line(autounet('explore', tmp_path/'odd.json'), 'not a fingerprint')
    one_line(autounet('explore', tmp_path))
    abdomen().save(tmp_path/'fingerprint.json')
    one_line(autounet('explore', tmp_path, '--hardware', 'abacus', '--no-browser'), 'abacus')
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0)); s.listen()
        one_line(autounet('explore', tmp_path, '--hardware', 'cpu', '--no-browser', '--port', s.getsockname()[1]), 'choose another')
    assert autounet('explore', tmp_path, '--port', 'x').returncode == 2

def test_without_voila_it_says_what_to_install(tmp_path, one_line):
    abdomen().save(tmp_path/'fingerprint.json')
    code = 'import sys; sys.modules["voila"] = None; from autounet_nb.app.cli import main; sys.exit(main(sys.argv[1:]))'
    one_line(subprocess.run([sys.executable, '-c', code, 'explore', str(tmp_path)], capture_output=True, encoding='utf-8'), 'pip install autounet_nb[explore]')

BROWSERS = 'chromium', 'chromium-browser', 'google-chrome'

@contextmanager
def browsed(url):
    "The page in a browser, which may say no errors and ask nothing of other servers"
    errors, foreign = [], []
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if not path: pytest.skip(f'there is no browser to test the page with: none of {", ".join(BROWSERS)} is installed')
    from playwright.sync_api import sync_playwright
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=path, args=['--no-sandbox', '--disable-background-networking'])
        tab = browser.new_page(viewport=dict(width=1280, height=1100))
        tab.on('console', lambda m: m.type == 'error' and errors.append(m.text))
        tab.on('pageerror', lambda e: errors.append(str(e)))
        tab.on('response', lambda r: urlsplit(r.url).hostname not in ('127.0.0.1', None) and foreign.append(r.url))
        tab.goto(url)
        yield tab
        browser.close()
    assert foreign == []
    assert [e for e in errors if 'https://cdn.jsdelivr.net/' not in e] == [] # Voilà's own template asks there for fonts, and may not have them

def test_a_saved_plan_is_gone_on_from_in_a_browser(tmp_path):
    "The work folder's plan has a spacing of the first stage set by hand: it is shown, changed, saved; reset makes it automatic"
    saved = make_plan(abdomen(), '11GB', {'3d_lowres.spacing': [5, 4, 4], '2d.batch_size': 7})
    saved.save(tmp_path/'plan.json')
    with served(tmp_path, tmp_path) as (p, url, folder), browsed(url) as tab:
        from playwright.sync_api import expect
        first = tab.get_by_role('button', name='3d_lowres', exact=True)
        expect(first).to_be_visible(timeout=60_000)
        expect(tab.get_by_label('batch size').locator('visible=true')).to_have_value('7')
        first.click()
        axes = [tab.get_by_label(a, exact=True).locator('visible=true').nth(1) for a in 'zyx'] # the first are those of the data's spacing
        for axis, mm in zip(axes, '544'): expect(axis).to_have_value(mm)
        expect(tab.get_by_text('5×4×4 (by hand)')).to_be_visible()
        expect(tab.get_by_text('to do again')).to_contain_text('nothing')
        axes[0].fill('6'); tab.keyboard.press('Enter')
        expect(tab.get_by_text('6×4×4 (by hand)')).to_be_visible()
        tab.screenshot(path=tmp_path/'first_stage.png', full_page=True)
        tab.get_by_role('button', name='Save plan').click(); tab.get_by_role('button', name='Replace plan').click()
        expect(tab.get_by_text('Saved as')).to_contain_text(str(tmp_path/'plan.json'))
        assert Plan.load(tmp_path/'plan.json') == make_plan(abdomen(), '11GB', {'3d_lowres.spacing': [6, 4, 4], '2d.batch_size': 7})
        tab.get_by_role('button', name='Reset').click()
        for axis, mm in zip(axes, make_plan(abdomen(), '11GB').models['3d_lowres'].spacing): expect(axis).to_have_value(f'{mm:g}')
        expect(tab.get_by_text('(by hand)')).to_have_count(0)
    closed(p, tmp_path)

def test_the_page_in_a_browser(page, tmp_path):
    "A control is moved by keyboard, the page shows what follows, and the saved file is the plan of that edit"
    p, url, folder = page
    with browsed(url) as tab:
        from playwright.sync_api import expect
        save = tab.get_by_role('button', name='Save plan')
        expect(save).to_be_visible(timeout=60_000)
        tab.get_by_role('button', name='3d', exact=True).click()
        auto = make_plan(abdomen(), 'gpu-12gb').models['3d']
        z = tab.get_by_label('z', exact=True).locator('visible=true').nth(1) # the first is the spacing's
        expect(z).to_have_value(str(auto.patch_size[0]))
        z.press('ArrowDown')
        edit = {'3d.patch_size': [auto.patch_size[0] - 2**auto.num_pool_per_axis[0], *auto.patch_size[1:]]}
        plan = make_plan(abdomen(), 'gpu-12gb', edit)
        expect(tab.get_by_text(f'{"×".join(map(str, plan.models["3d"].patch_size))} (by hand)')).to_be_visible()
        expect(tab.get_by_label('batch size').locator('visible=true')).to_have_value(str(plan.models['3d'].batch_size))
        tab.screenshot(path=tmp_path/'changed.png')
        save.click()
        expect(tab.get_by_text('Saved as')).to_contain_text(str(folder/'plan.json'))
        assert Plan.load(folder/'plan.json') == plan and plan.edits == edit
        tab.get_by_label('batch size').locator('visible=true').fill('4000')
        tab.keyboard.press('Enter')
        expect(tab.get_by_text('the nearest that fits is')).to_be_visible()
        tab.screenshot(path=tmp_path/'refused.png')
        tab.get_by_role('button', name='Reset').click()
        expect(tab.get_by_text('the nearest that fits is')).to_have_count(0)
        tab.get_by_text('Why', exact=True).click()
        tab.get_by_role('button', name='What would change it?').click()
        expect(tab.get_by_text('on cpu:').first).to_be_visible()
        tab.get_by_role('button', name='Save plan').click()
        expect(tab.get_by_role('button', name='Replace plan')).to_be_visible()
        assert Plan.load(folder/'plan.json') == plan
        tab.screenshot(path=tmp_path/'replace.png', full_page=True)
    closed(p, folder)
