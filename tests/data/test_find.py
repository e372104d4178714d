"Folders of every layout and files of every format, whole and broken."
import errno, gzip, json, locale, os, shutil
import numpy as np, pytest, SimpleITK as sitk
from PIL import Image
from autounet_nb.core.errors import DiskFull, InputError
from autounet_nb.core.executor import pmap
from autounet_nb.core.files import atomic, read_json, write_json
from autounet_nb.data.cases import Case, Dataset, read_case
from autounet_nb.data.find import find_scans, scan
from autounet_nb.data.geometry import Geometry
from autounet_nb.data.images import channel_names, read_image, read_label, write_like

rng = np.random.default_rng(0)
VOLUME = (100*rng.normal(size=(7, 20, 18))).astype(np.int16)
MASK = (VOLUME > 0).astype(np.uint8)
GREY = rng.integers(0, 256, (24, 30)).astype(np.uint8)
COLOUR = rng.integers(0, 256, (24, 30, 3)).astype(np.uint8)

def write(path, a, spacing=(1., 1., 1.), vector=False, compress=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    im = sitk.GetImageFromArray(a, isVector=vector)
    im.SetSpacing(spacing[:im.GetDimension()])
    sitk.WriteImage(im, str(path), compress)
    return path

def write_series(folder, a, modality='CT', uid='1.2.826.0.1.3680043.2.1125.7', mm=2.5):
    "One DICOM file per slice, with names that say nothing about their order"
    folder.mkdir(parents=True)
    w = sitk.ImageFileWriter()
    w.KeepOriginalImageUIDOn()
    for z, s in enumerate(a):
        im = sitk.GetImageFromArray(s)
        for k, v in {'0008|0060': modality, '0020|000e': uid, '0020|0032': f'0\\0\\{z*mm}', '0020|0037': '1\\0\\0\\0\\1\\0'}.items(): im.SetMetaData(k, v)
        w.SetFileName(str(folder/f'{(z*5) % 101:03}.dcm'))
        w.Execute(im)
    locale.setlocale(locale.LC_CTYPE, '') # the writer leaves another one behind
    return folder

def dataset_json(folder, **d): write_json(folder/'dataset.json', d)

def decathlon(root, n=3, end='.nii.gz', **d):
    for i in range(n):
        write(root/f'imagesTr/c{i}{end}', VOLUME + i)
        write(root/f'labelsTr/c{i}{end}', MASK)
    dataset_json(root, **{'name': 'Task', 'modality': {'0': 'MRI'}, 'labels': {'0': 'background', '1': 'lesion'},
                          'training': [{'image': f'./imagesTr/c{i}{end}', 'label': f'./labelsTr/c{i}{end}'} for i in range(n)], **d})
    return root

def nnunet(root, n=3, channels=2, end='.nii.gz', **d):
    for i in range(n):
        for c in range(channels): write(root/f'imagesTr/c{i}_{c:04}{end}', VOLUME + c)
        write(root/f'labelsTr/c{i}{end}', MASK)
    dataset_json(root, **{'channel_names': {str(c): f'T{c}' for c in range(channels)}, 'labels': {'background': 0, 'lesion': 1}, 'file_ending': end, **d})
    return root

def pairs(root, n=3, end='.nii.gz', image=VOLUME, mask=MASK, vector=False):
    for i in range(n):
        write(root/f'images/c{i}{end}', image, vector=vector)
        write(root/f'labels/c{i}{end}', mask)
    return root

# ---- layouts

def test_decathlon(tmp_path):
    ds = scan(decathlon(tmp_path/'t'))
    assert (ds.layout, ds.name, ds.modalities, ds.labels) == ('decathlon', 'Task', ('MRI',), {'background': 0, 'lesion': 1})
    assert [c.id for c in ds] == ['c0', 'c1', 'c2'] and not ds.unpaired
    assert all(os.path.isabs(p) for c in ds for p in (*c.images, c.label))

def test_decathlon_with_channels_as_fourth_dimension(tmp_path):
    root = decathlon(tmp_path, 1, modality={'1': 'T1', '0': 'FLAIR'})
    sitk.WriteImage(sitk.JoinSeries([sitk.GetImageFromArray(VOLUME), sitk.GetImageFromArray(VOLUME + 5)]), str(root/'imagesTr/c0.nii.gz'))
    ds = scan(root)
    s = read_case(ds[0])
    assert ds.modalities == ('FLAIR', 'T1')
    assert s.image.shape == (2, *VOLUME.shape) and (s.image[1] == VOLUME + 5).all()
    assert s.geometry.ndim == 3 and len(s.geometry.direction) == 9

@pytest.mark.parametrize('end', ['.nii.gz', '.nrrd', '.mha'])
def test_nnunet_2(tmp_path, end):
    ds = scan(nnunet(tmp_path/'Dataset007_X', end=end))
    assert (ds.layout, ds.name, ds.modalities) == ('nnunet', 'Dataset007_X', ('T0', 'T1'))
    assert [[os.path.basename(p) for p in c.images] for c in ds] == [[f'c{i}_0000{end}', f'c{i}_0001{end}'] for i in range(3)]
    assert (read_case(ds['c1']).image[1] == VOLUME + 1).all()

def test_nnunet_2_that_lists_its_files(tmp_path):
    root = nnunet(tmp_path, 1, 1)
    dataset_json(root, channel_names={'0': 'CT'}, labels={'background': 0, 'x': 1}, dataset={'one': {'images': ['imagesTr/c0_0000.nii.gz'], 'label': 'labelsTr/c0.nii.gz'}})
    assert [c.id for c in scan(root)] == ['one']

@pytest.mark.parametrize('channels', [1, 2])
def test_nnunet_1(tmp_path, channels):
    root = nnunet(tmp_path, channels=channels)
    dataset_json(root, modality={str(c): 'MRI' for c in range(channels)}, labels={'0': 'background', '1': 'x'},
                 training=[{'image': f'./imagesTr/c{i}.nii.gz', 'label': f'./labelsTr/c{i}.nii.gz'} for i in range(3)])
    ds = scan(root)
    assert (ds.layout, len(ds)) == ('nnunet', 3)
    assert read_case(ds[2]).image.shape[0] == channels

def test_plain_pairs(tmp_path):
    ds = scan(pairs(tmp_path/'p'))
    assert (ds.layout, ds.name, ds.labels, ds.modalities, len(ds)) == ('pairs', 'p', {}, ('channel 0',), 3)
    assert scan(tmp_path/'p', modalities=['CT'], classes={'liver': 1}).labels == {'background': 0, 'liver': 1}
    assert scan(tmp_path/'p', modalities='CT').modalities == ('CT',)

def test_pairs_of_two_formats(tmp_path):
    write(tmp_path/'images/a.mha', VOLUME); write(tmp_path/'labels/a.nrrd', MASK)
    assert len(scan(tmp_path)) == 1

def test_pairs_with_numbered_channels(tmp_path):
    for c in range(2): write(tmp_path/f'images/a_{c:04}.mha', VOLUME)
    write(tmp_path/'labels/a.mha', MASK)
    assert [len(c.images) for c in scan(tmp_path)] == [2]

def test_pairs_whose_numbers_are_names(tmp_path):
    for i in range(3): write(tmp_path/f'images/a_{i:04}.mha', VOLUME); write(tmp_path/f'labels/a_{i:04}.mha', MASK)
    assert [c.id for c in scan(tmp_path)] == ['a_0000', 'a_0001', 'a_0002']

def test_patterns(tmp_path):
    for k in 'ab':
        for c in ('t1', 'ct'): write(tmp_path/f'scans/{k}_{c}.nii.gz', VOLUME)
        write(tmp_path/f'masks/seg-{k}.mha', MASK)
    ds = scan(tmp_path, images='scans/*_{t1,ct}.nii.gz', labels='masks/seg-*.mha')
    assert [c.id for c in ds] == ['a', 'b'] and ds.modalities == ('t1', 'ct')
    assert [os.path.basename(p) for p in ds[0].images] == ['a_t1.nii.gz', 'a_ct.nii.gz']
    ds = scan(tmp_path, images=['scans/*_ct.nii.gz', 'scans/*_t1.nii.gz'], labels='masks/seg-*.mha')
    assert [os.path.basename(p) for p in ds[0].images] == ['a_ct.nii.gz', 'a_t1.nii.gz']

def test_pattern_over_folders(tmp_path):
    for k in 'ab': write(tmp_path/f'x/{k}/img.nii', VOLUME); write(tmp_path/f'x/{k}/seg.nii', MASK)
    assert [c.id for c in scan(tmp_path, images='x/*/img.nii', labels='x/*/seg.nii')] == ['a', 'b']
    assert [c.id for c in scan(tmp_path, images='**/img.nii', labels='**/seg.nii')] == ['x_a', 'x_b']

@pytest.mark.parametrize('end,colour', [('.png', False), ('.png', True), ('.tif', False), ('.tif', True), ('.bmp', True)]) # a grey BMP has a palette, so it is read as colours
def test_pictures(tmp_path, end, colour):
    a = COLOUR if colour else GREY
    ds = scan(pairs(tmp_path, end=end, image=a, mask=(GREY > 99).astype(np.uint8), vector=colour))
    s = read_case(ds[0])
    assert s.image.shape == (3 if colour else 1, 1, 24, 30) and len(ds.modalities) == len(s.image)
    assert (s.image[:, 0] == (a.transpose(2, 0, 1) if colour else a[None])).all()
    assert s.label.shape == (1, 24, 30) and s.geometry.ndim == 2 and s.geometry.spacing == (1., 1., 1.)

def test_jpeg_images_with_png_masks(tmp_path):
    write(tmp_path/'images/a.jpg', COLOUR, vector=True); write(tmp_path/'labels/a.png', GREY//128)
    assert read_case(scan(tmp_path)[0]).image.shape == (3, 1, 24, 30)

def test_dots_per_inch_are_no_millimetres(tmp_path):
    for end in ('jpg', 'tif'):
        Image.fromarray(GREY).save(tmp_path/f'a.{end}', dpi=(300, 72))
        assert read_image(tmp_path/f'a.{end}')[1].spacing == (1., 1., 1.)

def test_one_slice_volume(tmp_path):
    s = read_case(scan(pairs(tmp_path, image=VOLUME[:1], mask=MASK[:1]))[0])
    assert s.image.shape == (1, 1, 20, 18) and s.geometry.ndim == 3

def test_dicom_series_as_images(tmp_path):
    for k in 'ab': write_series(tmp_path/f'images/{k}', VOLUME); write(tmp_path/f'labels/{k}.nii.gz', MASK, (1., 1., 2.5))
    ds = scan(tmp_path)
    s = read_case(ds['b'])
    assert ds.modalities == ('CT',) and [c.id for c in ds] == ['a', 'b']
    assert (s.image[0] == VOLUME).all() and s.geometry.spacing == (2.5, 1., 1.)
    assert [c.id for c in find_scans(tmp_path/'images')] == ['a', 'b']
    assert find_scans(tmp_path/'images/a')[0].images == (str(tmp_path/'images/a'),)

def test_hidden_files_are_ignored(tmp_path):
    for f in ('p/images/._c0.nii.gz', 'p/labels/._c0.nii.gz', 'n/imagesTr/._c0_0000.nii.gz', 'n/labelsTr/.c9.nii.gz'):
        root = tmp_path/f[0]
        if not root.exists(): (pairs if f[0] == 'p' else nnunet)(root)
        (tmp_path/f).write_bytes(b'Mac OS X')
    for f in 'pn': assert len(scan(tmp_path/f)) == 3 and not scan(tmp_path/f).unpaired
    assert len(find_scans(tmp_path/'p/images')) == 3
    assert len(scan(tmp_path/'p', images='images/*', labels='labels/*')) == 3

def test_a_cycle_of_links_ends(tmp_path):
    (pairs(tmp_path)/'images/up').symlink_to(tmp_path)
    assert len(scan(tmp_path, images='**/images/*.nii.gz', labels='**/labels/*.nii.gz')) == 3

def test_files_without_partner_are_noted(tmp_path):
    root = nnunet(tmp_path, 5)
    for f in ('labelsTr/c0.nii.gz', 'imagesTr/c1_0001.nii.gz', 'imagesTr/c2_0000.nii.gz', 'imagesTr/c2_0001.nii.gz'): (root/f).unlink()
    write(root/'imagesTr/c3_0002.nii.gz', VOLUME)
    ds = scan(root)
    assert [c.id for c in ds] == ['c3', 'c4']
    assert {os.path.basename(k): v for k, v in ds.unpaired.items()} == {'c0_0000.nii.gz': 'image without a mask', 'c1_0000.nii.gz': '1 of its 2 channels are missing',
        'c2.nii.gz': 'mask without an image', 'c3_0002.nii.gz': 'belongs to no case of dataset.json'}

def test_decathlon_with_files_that_the_list_lacks(tmp_path):
    root = decathlon(tmp_path)
    (root/'imagesTr/c0.nii.gz').unlink(); (root/'labelsTr/c0.nii.gz').unlink()
    write(root/'labelsTr/c9.nii.gz', MASK)
    assert list(scan(root).unpaired.values()) == ['listed in dataset.json, but neither image nor mask are there', 'belongs to no case of dataset.json']

def test_saved_and_loaded(tmp_path):
    ds = scan(nnunet(tmp_path))
    ds.save(tmp_path/'d.json')
    assert Dataset.load(tmp_path/'d.json') == ds
    assert 'T0, T1' in repr(ds) and '<table>' in ds._repr_html_()

@pytest.mark.parametrize('kind', ['decathlon', 'nnunet', 'pairs'])
def test_suffixes_in_capitals(tmp_path, kind):
    root = {'decathlon': decathlon, 'nnunet': nnunet, 'pairs': pairs}[kind](tmp_path)
    for p in root.glob('*/*.nii.gz'): p.rename(str(p).replace('.nii.gz', '.NII.GZ'))
    if kind == 'decathlon': (root/'dataset.json').write_text((root/'dataset.json').read_text().replace('.nii.gz', '.NII.GZ'))
    ds = scan(root)
    assert len(ds) == 3 and not ds.unpaired
    assert (read_case(ds[2]).label == MASK).all() and len(read_case(ds[2]).image) == len(ds.modalities)

@pytest.mark.parametrize('kind,sub', [(k, s) for k, ss in (('decathlon', ('imagesTr', 'labelsTr')), ('nnunet', ('imagesTr', 'labelsTr')), ('pairs', ('images', 'labels'))) for s in ss])
def test_links_that_lead_nowhere_are_noted(tmp_path, kind, sub):
    root = {'decathlon': decathlon, 'nnunet': nnunet, 'pairs': pairs}[kind](tmp_path)
    p = sorted((root/sub).iterdir())[0]
    p.unlink(); p.symlink_to(tmp_path/'gone.nii.gz')
    ds = scan(root)
    assert ds.unpaired == {str(p): 'a link to a file that is not there'} and [c.id for c in ds] == ['c1', 'c2']
    if kind == 'pairs': assert scan(root, images='images/*', labels='labels/*').unpaired == ds.unpaired

# ---- folders that are refused

@pytest.mark.parametrize('bad', ['../out.nii.gz', '/etc/hosts', 'imagesTr/../../out.nii.gz', './../data2/x.nii.gz'])
@pytest.mark.parametrize('where', ['image', 'label', 'images'])
def test_paths_that_leave_the_folder(tmp_path, bad, where):
    root = decathlon(tmp_path/'data')
    write(tmp_path/'out.nii.gz', VOLUME); write(tmp_path/'data2/x.nii.gz', VOLUME)
    entry = {'image': 'imagesTr/c0.nii.gz', 'label': 'labelsTr/c0.nii.gz'}
    d = {'modality': {'0': 'MRI'}, 'labels': {'a': 1}, 'training': [{**entry, where: bad}]}
    if where == 'images': d = {'channel_names': {'0': 'MRI'}, 'labels': {'a': 1}, 'dataset': {'c0': {'images': [bad], 'label': entry['label']}}}
    dataset_json(root, **d)
    with pytest.raises(InputError, match='leads out of the folder'): scan(root)

@pytest.mark.parametrize('id', ['../c0', 'a/b', 'a\\b', '', '.hidden'])
def test_ids_that_leave_the_folder(tmp_path, id):
    root = decathlon(tmp_path)
    dataset_json(root, channel_names={'0': 'MRI'}, labels={'a': 1}, dataset={id: {'images': ['imagesTr/c0.nii.gz'], 'label': 'labelsTr/c0.nii.gz'}})
    with pytest.raises(InputError, match='cannot be the id of a case'): scan(root)

@pytest.mark.parametrize('text', ['', '{"labels": ', '\x00\x01', '[1, 2]', '"text"', '{}', '{"labels": {"a": 1}}', '{"modality": {"0": "CT"}, "training": 5, "labels": {"a": 1}}',
    '{"modality": {"0": "CT"}, "training": [1], "labels": {"a": 1}}', '{"modality": 3, "labels": {"a": 1}}', '{"modality": {"0": "CT"}, "training": [{"image": "imagesTr/c0.nii.gz"}], "labels": {"a": 1}}'])
def test_broken_dataset_json(tmp_path, text):
    root = decathlon(tmp_path)
    (root/'dataset.json').write_text(text)
    with pytest.raises(InputError, match='dataset.json'): scan(root)

@pytest.mark.parametrize('labels,says', [({'background': 0, 'whole': [1, 2]}, 'region'), ({'a': 1, 'ignore': 2}, 'ignore'),
    ({'a': 'x'}, 'whole numbers'), ({'a': -1}, 'whole numbers'), ({'a': True}, 'whole numbers'), ({'a': '²'}, 'whole numbers'), ({'²': 'a'}, 'whole numbers'),
    ({'a': 65536}, '0 to 65535'), ({'a': 10**30}, '0 to 65535'), ({'a': '9'*5000}, '0 to 65535'), ({'9'*5000: 'a'}, '0 to 65535'), ({'a': 1, 'b': 1}, 'twice'), ({'1': 'a', '2': 'a'}, 'twice'), (None, 'labels'), ([0, 1], 'labels')])
def test_labels_that_cannot_be_trained_on(tmp_path, labels, says):
    with pytest.raises(InputError, match=says): scan(nnunet(tmp_path, labels=labels))

def test_channels_in_the_order_of_their_numbers(tmp_path):
    names = {str(c): f'T{c}' for c in reversed(range(12))}
    assert scan(nnunet(tmp_path, 1, 12, channel_names=names)).modalities == tuple(f'T{c}' for c in range(12))

def test_labels_either_way_round(tmp_path):
    for labels in ({'b': 2, 'a': 1, 'background': 0}, {'0': 'background', '2': 'b', '1': 'a'}, {'a': '1', 'b': '2'}):
        assert list(scan(nnunet(tmp_path, labels=labels)).labels.items()) == [('background', 0), ('a', 1), ('b', 2)]

def test_folders_with_nothing_in_them(tmp_path):
    for f in ('empty', 'no_masks/images', 'no_masks/labels'): (tmp_path/f).mkdir(parents=True)
    write(tmp_path/'no_masks/images/a.nii.gz', VOLUME)
    with pytest.raises(InputError, match='no such folder'): scan(tmp_path/'nowhere')
    with pytest.raises(InputError, match='no dataset.json and no folders images and labels'): scan(tmp_path/'empty')
    with pytest.raises(InputError, match='a.nii.gz: image without a mask'): scan(tmp_path/'no_masks')
    with pytest.raises(InputError, match='no file fits'): scan(tmp_path/'no_masks', images='images/*', labels='labels/*')
    with pytest.raises(InputError, match='pattern for labels is missing'): scan(tmp_path/'no_masks', images='images/*')
    with pytest.raises(InputError, match='2 modalities are given'): scan(pairs(tmp_path/'p'), modalities=['a', 'b'])
    with pytest.raises(InputError, match='no folder imagesTr'): scan(decathlon(tmp_path/'t', 0, channel_names={'0': 'CT'}))

def test_two_files_of_one_case(tmp_path):
    root = decathlon(tmp_path/'a')
    d = read_json(root/'dataset.json')
    write_json(root/'dataset.json', {**d, 'training': d['training']*2})
    with pytest.raises(InputError, match='case c0: it is listed 2 times'): scan(root)
    write(pairs(tmp_path/'b')/'images/c0.mha', VOLUME)
    with pytest.raises(InputError, match='would both be case c0'): scan(tmp_path/'b')
    with pytest.raises(InputError, match='would both be case c0'): find_scans(tmp_path/'b/images')

# ---- files that are whole, and files that aren't

def itk(a, end, compress=False, vector=False): return lambda p: write(p/f'a.{end}', a, vector=vector, compress=compress)
def pil(end, **kw):
    def f(p):
        ims = [Image.fromarray(np.cumsum(s, 1).astype(np.uint8)) for s in VOLUME]
        ims[0].save(p/f'a.{end}', **({'save_all': True, 'append_images': ims[1:]} if end == 'tif' else {}), **kw)
        return p/f'a.{end}'
    return f

def thumbnail(p): # a JPEG that carries a whole small JPEG in its header
    Image.fromarray(GREY[:8, :8]).save(p/'t.jpg')
    small = (p/'t.jpg').read_bytes()
    Image.fromarray(GREY).save(p/'a.jpg', exif=b'Exif\0\0' + small)
    assert (p/'a.jpg').read_bytes().count(b'\xff\xd9') == 2
    return p/'a.jpg'

def dicom(p): return next(write_series(p/'d', VOLUME[:1]).iterdir())
def detached(end, voxels, compress=False): # a header, and voxels in a file beside it: (file to cut, file to read)
    def f(p):
        head = write(p/f'a.{end}', VOLUME, compress=compress)
        return p/f'a.{voxels}', head
    return f

FORMATS = {'nii': itk(VOLUME, 'nii'), 'nii.gz': itk(VOLUME, 'nii.gz'), 'float nii.gz': itk(VOLUME.astype(np.float32), 'nii.gz'), 'vector nii.gz': itk(COLOUR[None], 'nii.gz', vector=True),
    'nrrd': itk(VOLUME, 'nrrd'), 'gz nrrd': itk(VOLUME, 'nrrd', True), 'mha': itk(VOLUME, 'mha'), 'gz mha': itk(VOLUME, 'mha', True), 'png': itk(GREY, 'png'), 'colour png': itk(COLOUR, 'png', vector=True),
    'jpg': itk(GREY, 'jpg'), 'colour jpg': itk(COLOUR, 'jpg', vector=True), 'jpg with thumbnail': thumbnail, 'tif': itk(GREY, 'tif'), 'tif stack': itk(VOLUME.clip(0).astype(np.uint8), 'tif'),
    'pil tif stack': pil('tif'), 'pil lzw tif stack': pil('tif', compression='tiff_lzw'), 'pil big tif': pil('tif', big_tiff=True), 'progressive jpg': pil('jpg', progressive=True), 'bmp': itk(GREY, 'bmp'), 'dcm': dicom,
    'img': detached('hdr', 'img'), 'nhdr': detached('nhdr', 'raw'), 'gz nhdr': detached('nhdr', 'raw.gz', True), 'mhd': detached('mhd', 'raw'), 'gz mhd': detached('mhd', 'zraw', True)}

@pytest.mark.parametrize('name', FORMATS)
def test_truncated_files_are_refused(tmp_path, name):
    made = FORMATS[name](tmp_path)
    cut, path = made if isinstance(made, tuple) else (made, made)
    whole, x = cut.read_bytes(), read_image(path)[0]
    for share in (0, .01, .2, .5, .75, .9):
        cut.write_bytes(whole[:int(len(whole)*share)])
        with pytest.raises(InputError) as e: read_image(path)
        assert (str(path) in str(e.value) or str(cut) in str(e.value)) and '\n' not in str(e.value)
    for lost in range(1, 20): # near the end a file may lack nothing but a comment; half a voxel is never read
        cut.write_bytes(whole[:-lost])
        try: y = read_image(path)[0]
        except InputError: continue
        assert y.shape == x.shape and (y == x).all(), f'{lost} bytes are missing and nobody noticed'

@pytest.mark.parametrize('name', ['nii.gz', 'gz nrrd', 'gz mha', 'gz nhdr', 'gz mhd', 'png'])
def test_damaged_files_are_refused(tmp_path, name):
    made = FORMATS[name](tmp_path)
    hit, path = made if isinstance(made, tuple) else (made, made)
    whole = hit.read_bytes()
    for i in range(len(whole)//2, len(whole)*9//10, max(1, len(whole)//25)):
        b = bytearray(whole)
        b[i] ^= 4
        hit.write_bytes(b)
        with pytest.raises(InputError): read_image(path)

@pytest.mark.parametrize('name', ['nii.gz', 'gz nrrd', 'gz mha'])
def test_lost_checksums_are_noticed(tmp_path, name): # all voxels are there, but nobody can know
    p = FORMATS[name](tmp_path)
    p.write_bytes(p.read_bytes()[:-2])
    with pytest.raises(InputError, match='truncated'): read_image(p)

def test_header_that_promises_more_than_gzip_holds(tmp_path):
    p = write(tmp_path/'a.nii', VOLUME)
    (tmp_path/'a.nii.gz').write_bytes(gzip.compress(p.read_bytes()[:-100])) # cut first, packed later: the checksum is right
    with pytest.raises(InputError, match='truncated'): read_image(tmp_path/'a.nii.gz')

def test_gzip_in_several_parts(tmp_path): # as bgzip and pigz write it
    b = write(tmp_path/'a.nii', VOLUME).read_bytes()
    (tmp_path/'a.nii.gz').write_bytes(gzip.compress(b[:999]) + gzip.compress(b[999:]))
    assert (read_image(tmp_path/'a.nii.gz')[0][0] == VOLUME).all()

def test_bytes_behind_the_packed_data(tmp_path):
    p = write(tmp_path/'a.nii.gz', VOLUME)
    p.write_bytes(p.read_bytes() + bytes(300)) # zeros are padding
    assert (read_image(p)[0][0] == VOLUME).all()
    p.write_bytes(p.read_bytes() + b'<html>')
    with pytest.raises(InputError, match='behind the end of its packed data come other bytes'): read_image(p)

def test_a_bare_file_that_is_called_gz(tmp_path):
    p = write(tmp_path/'a.nii', VOLUME.astype(np.float32)).rename(tmp_path/'a.nii.gz')
    assert (read_image(p)[0][0] == VOLUME).all()
    p.write_bytes(p.read_bytes()[:-4] + np.float32(np.nan).tobytes())
    with pytest.raises(InputError, match='1 voxels are NaN'): read_image(p)
    p.write_bytes(p.read_bytes()[:-4])
    with pytest.raises(InputError, match='truncated'): read_image(p)

@pytest.mark.parametrize('own,name', [('nii.GZ', 'a.nii.gz'), ('Nii', 'a.nii'), ('MHA', 'a.mha'), ('Mhd', 'a.mhd'), ('Jpg', 'a.jpg')])
def test_spellings_that_itk_does_not_know(tmp_path, own, name, capfd):
    write(tmp_path/name, GREY).rename(tmp_path/f'x.{own}')
    with pytest.raises(InputError, match=f'does not know the suffix .{own}; rename the file to {name.replace("a", "x", 1)}$'): read_image(tmp_path/f'x.{own}')
    assert capfd.readouterr() == ('', '')

@pytest.mark.parametrize('own', ['NII.GZ', 'NII', 'NRRD', 'PNG', 'JPG', 'JPEG', 'BMP', 'TIF', 'Tif', 'Png'])
def test_spellings_that_itk_knows(tmp_path, own):
    x = read_image(write(tmp_path/f'a.{own.lower()}', GREY))[0]
    p = (tmp_path/f'a.{own.lower()}').rename(tmp_path/f'a.{own}')
    assert (read_image(p)[0] == x).all()
    p.write_bytes(p.read_bytes()[:len(p.read_bytes())//2])
    with pytest.raises(InputError): read_image(p)

def test_header_in_capitals(tmp_path):
    write(tmp_path/'a.hdr', VOLUME)
    for end in ('hdr', 'img'): (tmp_path/f'a.{end}').rename(tmp_path/f'a.{end.upper()}')
    assert (read_image(tmp_path/'a.HDR')[0][0] == VOLUME).all()

@pytest.mark.parametrize('end', ['mhd', 'nhdr'])
@pytest.mark.parametrize('where', ['{out}', '../out.raw', 'sub/../../out.raw', 'LIST', 'LIST 2', 'a%03d.raw 1 7 1', '../d2/out.raw'])
def test_headers_that_name_files_elsewhere(tmp_path, end, where):
    (tmp_path/'d').mkdir(); (tmp_path/'d2').mkdir()
    write(tmp_path/f'd/a.{end}', VOLUME)
    for p in ('out.raw', 'd2/out.raw', 'd/LIST', 'd/LIST 2'): shutil.copy(tmp_path/'d/a.raw', tmp_path/p)
    p = tmp_path/f'd/a.{end}'
    head = p.read_text()
    assert head.count('a.raw') == 1
    p.write_text(head.replace('a.raw', where.format(out=tmp_path/'out.raw')))
    for f in (read_image, channel_names):
        with pytest.raises(InputError, match='only one file in the folder of the header is read'): f(p)
    (tmp_path/'d/sub').mkdir(); (tmp_path/'d/a.raw').rename(tmp_path/'d/sub/b.raw')
    p.write_text(head.replace('a.raw', './sub/b.raw')) # below its own folder
    assert (read_image(p)[0][0] == VOLUME).all()

@pytest.mark.parametrize('end,spelled', [('mhd', 'ElementDataFile : {}'), ('mhd', 'Comment = ElementDataFile = LOCAL\nElementDataFile = {}'), ('mhd', ' ElementDataFile={}'),
    ('mha', 'ElementDataFile = {}'), ('nhdr', 'datafile: {}'), ('nhdr', 'DATA FILE: {}'), ('nrrd', 'data file: {}')])
def test_headers_that_name_files_in_other_words(tmp_path, end, spelled):
    p = write(tmp_path/f'd/a.{"mhd" if end[0] == "m" else "nhdr"}', VOLUME)
    *head, last = p.read_text().splitlines()
    assert 'a.raw' in last
    shutil.copy(tmp_path/'d/a.raw', tmp_path/'out.raw')
    (tmp_path/f'd/b.{end}').write_text('\n'.join([*head, spelled.format(tmp_path/'out.raw'), '']))
    with pytest.raises(InputError, match='only one file in the folder of the header is read'): read_image(tmp_path/f'd/b.{end}')

@pytest.mark.parametrize('end', ['mhd', 'nhdr', 'mha', 'nrrd'])
@pytest.mark.parametrize('a,vector', [(VOLUME, False), (COLOUR.astype(np.float64)[None], True), (GREY, False)])
def test_voxels_that_a_header_lacks(tmp_path, end, a, vector, capfd):
    p = write(tmp_path/f'a.{end}', a, vector=vector)
    raw = tmp_path/'a.raw' if end[-1] in 'dr' and end != 'nrrd' else p
    assert read_image(p)[0].size == a.size
    raw.write_bytes(raw.read_bytes()[:-1])
    with pytest.raises(InputError, match=f'{raw.name}: the file is truncated'): read_image(p)
    if raw != p:
        raw.unlink()
        for f in (read_image, channel_names):
            with pytest.raises(InputError, match=f'{p.name}: its voxels should be in {raw}, which is not there'): f(p)
    assert capfd.readouterr() == ('', '')

@pytest.mark.parametrize('end', ['nrrd', 'nhdr', 'mha', 'mhd'])
@pytest.mark.parametrize('dtype', [np.int16, np.float32])
def test_formats_that_inherit_the_words_of_nifti(tmp_path, end, dtype):
    sitk.WriteImage(sitk.ReadImage(str(write(tmp_path/'a.nii.gz', VOLUME.astype(dtype)))), str(tmp_path/f'b.{end}'))
    assert (read_image(tmp_path/f'b.{end}')[0][0] == VOLUME).all()

def test_text_voxels(tmp_path): # numbers written out: fewer bytes than voxels take in memory
    (tmp_path/'a.mha').write_text('ObjectType = Image\nNDims = 2\nBinaryData = False\nDimSize = 3 2\nElementType = MET_DOUBLE\nElementDataFile = LOCAL\n1 2 3\n4 5 6\n')
    assert read_image(tmp_path/'a.mha')[0].ravel().tolist() == [1, 2, 3, 4, 5, 6]

def test_files_that_are_no_images(tmp_path):
    for name in ('a.nii.gz', 'a.tif', 'a.jpg', 'a.png', 'a.dcm', 'a.mha', 'a.nrrd'):
        for content in (b'', b'hello', b'II*\0', b'\xff\xd8', bytes(500)):
            (tmp_path/name).write_bytes(content)
            with pytest.raises(InputError, match=name): read_image(tmp_path/name)
    with pytest.raises(InputError, match='no such file'): read_image(tmp_path/'nowhere.nii')

@pytest.mark.parametrize('kw', [{}, {'progressive': True}, {'quality': 20, 'subsampling': 2}, {'restart_marker_blocks': 1}])
@pytest.mark.parametrize('mode', ['L', 'RGB', 'CMYK'])
def test_truncated_jpegs_of_every_kind(tmp_path, mode, kw):
    grey = np.cumsum(rng.integers(-3, 4, (90, 121)), 1).clip(0, 255).astype(np.uint8)
    Image.fromarray(grey).convert(mode).save(tmp_path/'a.jpg', **kw)
    whole, x = (tmp_path/'a.jpg').read_bytes(), read_image(tmp_path/'a.jpg')[0]
    for size in (*range(4, len(whole) - 2, len(whole)//30), len(whole) - 2, len(whole) - 1):
        (tmp_path/'a.jpg').write_bytes(whole[:size])
        try: y = read_image(tmp_path/'a.jpg')[0]
        except InputError as e: assert 'truncated' in str(e) and '\n' not in str(e)
        else: assert size > len(whole) - 3 and (y == x).all(), f'{len(whole) - size} bytes are missing and nobody noticed'

def test_a_very_large_jpeg(tmp_path, recwarn): # at which Pillow's own reader suspects an attack
    Image.fromarray(np.zeros((9500, 9500), np.uint8)).save(tmp_path/'a.jpg')
    assert len(channel_names(tmp_path/'a.jpg')) == 1 and not recwarn.list

def test_a_picture_under_the_wrong_name(tmp_path):
    write(tmp_path/'a.png', GREY)
    shutil.copy(tmp_path/'a.png', tmp_path/'a.jpg')
    assert (read_image(tmp_path/'a.jpg')[0][0, 0] == GREY).all()

@pytest.mark.parametrize('order', '<>')
@pytest.mark.parametrize('mm', [0, -2, np.nan, np.inf])
def test_spacings_that_itk_replaces(tmp_path, mm, order):
    b = bytearray(write(tmp_path/'a.nii', VOLUME.astype(np.int16)).read_bytes())
    if order == '>': # the same file, as an old big-endian machine writes it
        for n, parts in ((4, [(0, 1), (32, 1), (56, 3), (76, 8), (108, 3), (124, 6), (256, 18)]), (2, [(36, 1), (40, 8), (68, 4), (120, 1), (252, 2), (352, VOLUME.size)])):
            for at, k in parts: b[at:at + n*k] = np.frombuffer(bytes(b[at:at + n*k]), f'<u{n}').astype(f'>u{n}').tobytes()
        (tmp_path/'a.nii').write_bytes(b)
        assert (read_image(tmp_path/'a.nii')[0][0] == VOLUME).all()
    b[84:88] = np.array(mm, order + 'f4').tobytes() # pixdim[2]
    (tmp_path/'a.nii').write_bytes(b)
    with pytest.raises(InputError, match='spacing along y') as e: read_image(tmp_path/'a.nii')
    assert e.value.code == 'spacing'

@pytest.mark.parametrize('end', ['nii', 'nii.gz', 'mha', 'nrrd'])
@pytest.mark.parametrize('dtype', [np.float32, np.float64])
@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_voxels_that_are_not_finite(tmp_path, end, dtype, bad):
    a = VOLUME.astype(dtype)
    write(tmp_path/f'ok.{end}', a)
    assert (read_image(tmp_path/f'ok.{end}')[0][0] == VOLUME).all()
    a[6, 19, 17] = bad
    with pytest.raises(InputError, match='1 voxels are NaN') as e: read_image(write(tmp_path/f'a.{end}', a))
    assert e.value.code == 'not-finite'

@pytest.mark.parametrize('end', ['nii', 'nii.gz', 'mha', 'nrrd'])
def test_voxels_beyond_float32(tmp_path, end, recwarn):
    a = VOLUME.astype(np.float64)
    a[0, 0, :2] = 3e38, -3e38
    assert np.isfinite(read_image(write(tmp_path/f'ok.{end}', a))[0]).all()
    for v in (1e39, -1.7e308):
        a[1:3, 2, 3] = v # the sum of two of them is infinite even in 64 bits
        with pytest.raises(InputError, match=f'a.{end}: holds the value {v:g}'.replace('+', r'\+')): read_image(write(tmp_path/f'a.{end}', a))
    assert not recwarn.list

def test_dicom_series_with_a_gap(tmp_path):
    d = write_series(tmp_path/'a', VOLUME)
    (d/'015.dcm').unlink()
    with pytest.raises(InputError, match='gaps between slices go from 2.5 to 5 mm'): read_image(d)

def test_dicom_folder_with_two_series(tmp_path):
    d = write_series(tmp_path/'a', VOLUME)
    for p in write_series(tmp_path/'b', VOLUME, uid='1.2.826.0.1.3680043.2.1125.8').iterdir(): shutil.copy(p, d/f'b{p.name}')
    with pytest.raises(InputError, match='holds 2 DICOM series'): read_image(d)

@pytest.mark.parametrize('name', ['000', '015', '030']) # the first one, one in the middle, the last one
@pytest.mark.parametrize('end', ['.dcm', ''])
def test_dicom_series_with_a_truncated_slice(tmp_path, name, end):
    d = write_series(tmp_path/'a', VOLUME)
    for p in list(d.iterdir()): p.rename(p.with_suffix(end))
    for note in ('notes.txt', 'README', '.hidden.dcm'): (d/note).write_text('This is no slice')
    p = d/f'{name}{end}'
    whole = p.read_bytes()
    (d/'DICOMDIR').write_bytes(whole[:300]) # begins as a slice does
    for content in (b'', whole[:60], whole[:131], whole[:132], whole[:500], whole[:-1], bytes(len(whole)), *([b'<html>404'] if end else [])):
        p.write_bytes(content)
        for f in (read_image, channel_names):
            with pytest.raises(InputError, match=f'{p}: the file is truncated'): f(d)
    p.write_bytes(whole)
    assert (read_image(d)[0][0] == VOLUME).all()

# ---- masks, cases, results

def test_masks(tmp_path):
    for dtype in (np.uint8, np.int16, np.uint16, np.int32, np.float32, np.float64):
        y, _ = read_label(write(tmp_path/'a.nii.gz', (MASK*3).astype(dtype)))
        assert y.dtype.kind in 'iu' and (y == MASK*3).all()
    write(tmp_path/'grey.png', np.stack([GREY]*3, -1), vector=True)
    assert (read_label(tmp_path/'grey.png')[0][0] == GREY).all()
    for name, a, kind in (('a.nii.gz', MASK*.5, 'not-whole'), ('a.mha', np.where(MASK, np.inf, 0.), 'not-whole')):
        with pytest.raises(InputError) as e: read_label(write(tmp_path/name, a))
        assert e.value.code == kind
    with pytest.raises(InputError, match='3 channels'): read_label(write(tmp_path/'rgb.png', COLOUR, vector=True))
    for v in (3e9, -1e300):
        with pytest.raises(InputError, match='whole numbers') as e: read_label(write(tmp_path/'a.nrrd', np.where(MASK, v, 0.)))
        assert e.value.code == 'not-whole'

@pytest.mark.parametrize('end', ['png', 'tif', 'bmp'])
def test_pictures_that_are_opaque(tmp_path, end):
    full = np.full_like(GREY, 255)
    def save(name, *channels): Image.fromarray(np.stack(channels, -1), 'RGBA').save(tmp_path/f'{name}.{end}'); return tmp_path/f'{name}.{end}'
    assert (read_label(save('mask', GREY, GREY, GREY, full))[0][0] == GREY).all()
    p = save('image', *COLOUR.transpose(2, 0, 1), full)
    assert (read_image(p)[0][:, 0] == COLOUR.transpose(2, 0, 1)).all() and len(channel_names(p)) == 3
    full[3, 4] = 254 # now it says something
    p = save('clear', *COLOUR.transpose(2, 0, 1), full)
    assert (read_image(p)[0][3] == full).all() and len(channel_names(p)) == 4
    with pytest.raises(InputError, match='4 channels'): read_label(save('clear_mask', GREY, GREY, GREY, full))

def test_case_whose_files_do_not_fit(tmp_path):
    image = str(write(tmp_path/'i.nii.gz', VOLUME))
    for name, a, mm, says in (('size', MASK[1:], (1., 1., 1.), 'size of image and mask'), ('spacing', MASK, (1., 1., 2.), 'spacing of image and mask')):
        with pytest.raises(InputError, match=f'case c: the {says}'): read_case(Case('c', (image,), str(write(tmp_path/f'{name}.nii.gz', a, mm))))
    with pytest.raises(InputError, match='case c: .*channels'): read_case(Case('c', (image, str(write(tmp_path/'j.nii.gz', VOLUME, (2., 2., 2.))))))
    noisy = str(write(tmp_path/'n.nii.gz', MASK, (1.00001, 1., .99999)))
    assert read_case(Case('c', (image,), noisy)).label.sum() == MASK.sum()

@pytest.mark.parametrize('end', ['.nii.gz', '.nii', '.nrrd', '.mha'])
@pytest.mark.parametrize('ndim', [2, 3])
def test_results_lie_where_their_scan_lies(tmp_path, end, ndim):
    c, s = np.cos(.4), np.sin(.4)
    im = sitk.GetImageFromArray(VOLUME if ndim == 3 else GREY)
    im.SetSpacing((.7, .8, 2.5)[:ndim]); im.SetOrigin((-10.5, 3.25, 700.)[:ndim])
    im.SetDirection((c, -s, 0, s, c, 0, 0, 0, 1) if ndim == 3 else (c, -s, s, c))
    sitk.WriteImage(im, str(tmp_path/f'scan{end}'))
    x, g = read_image(tmp_path/f'scan{end}')
    assert g.ndim == ndim
    y = (x[0] > 0).astype(np.int64)*300
    write_like(y, g, tmp_path/f'out{end}')
    a, b = sitk.ReadImage(str(tmp_path/f'scan{end}')), sitk.ReadImage(str(tmp_path/f'out{end}'))
    assert a.GetSize() == b.GetSize() and b.GetPixelID() == sitk.sitkUInt16
    for k in ('Spacing', 'Origin', 'Direction'): np.testing.assert_allclose(getattr(a, f'Get{k}')(), getattr(b, f'Get{k}')(), rtol=1e-6, atol=1e-6)
    assert (read_label(tmp_path/f'out{end}')[0] == y).all()

@pytest.mark.parametrize('end', ['tif', 'tiff'])
def test_tiff_has_no_place(tmp_path, end):
    turned = (1., 0., 0., 0., 0., -1., 0., 1., 0.)
    eye = tuple(np.eye(3).ravel().tolist())
    for lost, g in {'spacing': ((2., 1., 1.), (0.,)*3, eye), 'origin': ((1.,)*3, (0., 5., 0.), eye), 'direction': ((1.,)*3, (0.,)*3, turned)}.items():
        for y in (MASK, MASK[:1]):
            with pytest.raises(InputError, match=f'TIFF would lose the {lost} of the scan'): write_like(y, Geometry(y.shape, *g), tmp_path/f'a.{end}')
    assert list(tmp_path.iterdir()) == []
    g = read_image(write(tmp_path/f'scan.{end}', VOLUME.astype(np.uint16)))[1] # a stack of TIFF pages can be answered with one
    write_like(MASK, g, tmp_path/f'out.{end}')
    y, g2 = read_label(tmp_path/f'out.{end}')
    assert (y == MASK).all() and g2 == g
    g = Geometry((1, *GREY.shape), (1., .7, .7), (0., 0.), (1., 0., 0., 1.), 2)
    write_like(GREY[None], g, tmp_path/f'flat.{end}')
    assert (read_label(tmp_path/f'flat.{end}')[0] == GREY).all()

def test_results_that_cannot_be_written(tmp_path):
    g = Geometry(MASK.shape, (1., 1., 1.), (0., 0., 0.), tuple(np.eye(3).ravel()), 3)
    for y, name, says in ((MASK[1:], 'a.nii.gz', 'shape'), (MASK, 'a.png', 'one slice'), (MASK, 'a.jpg', 'can be written as'), (MASK, 'a.NII.GZ', 'can be written as'), (MASK*.5, 'a.nii.gz', 'whole numbers'),
                          (MASK.astype(int) - 1, 'a.nii.gz', 'whole numbers'), (MASK.astype(int)*70000, 'a.nii.gz', 'whole numbers')):
        with pytest.raises(InputError, match=says): write_like(y, g, tmp_path/name)
    assert list(tmp_path.iterdir()) == []

def test_writing_is_whole_or_not_at_all(tmp_path):
    write_json(tmp_path/'a.json', {'a': 1})
    for error, seen in ((OSError('pulled out'), OSError), (OSError(errno.ENOSPC, 'No space left on device'), DiskFull), (OSError(errno.EDQUOT, 'Quota exceeded'), DiskFull), (KeyError('x'), KeyError)):
        with pytest.raises(seen) as e:
            with atomic(tmp_path/'a.json') as p:
                p.write_text('{')
                raise error
        assert type(e.value) is seen
        if seen is DiskFull: assert (e.value.where, e.value.code) == (str(tmp_path/'a.json'), 'disk-full')
    assert [p.name for p in tmp_path.iterdir()] == ['a.json'] and read_json(tmp_path/'a.json') == {'a': 1}

def test_find_scans(tmp_path):
    nnunet(tmp_path/'n'); pairs(tmp_path/'p')
    assert [(c.id, len(c.images)) for c in find_scans(tmp_path/'n/imagesTr', 2)] == [('c0', 2), ('c1', 2), ('c2', 2)]
    assert [c.id for c in find_scans([tmp_path/'p/images/c2.nii.gz', tmp_path/'p/images/c0.nii.gz'])] == ['c0', 'c2']
    assert [c.id for c in find_scans(nnunet(tmp_path/'m', channels=1)/'imagesTr')] == ['c0', 'c1', 'c2']
    for i in range(2): write(tmp_path/f'rgb/f_{i:04}.png', COLOUR, vector=True); write(tmp_path/f'grey/f_{i:04}.png', GREY)
    assert [c.id for c in find_scans(tmp_path/'rgb', 3)] == ['f_0000', 'f_0001']
    assert [c.id for c in find_scans(tmp_path/'grey')] == ['f_0000', 'f_0001']
    (tmp_path/'n/imagesTr/c1_0001.nii.gz').unlink()
    with pytest.raises(InputError, match='case c1: the model needs 2 channels'): find_scans(tmp_path/'n/imagesTr', 2)
    with pytest.raises(InputError, match='no such file'): find_scans(tmp_path/'nowhere')
    with pytest.raises(InputError, match='no scan in it'): find_scans(tmp_path)

def odd(i):
    if i % 2 == 0: raise InputError(i, 'is even')
    return os.getpid()

@pytest.mark.parametrize('workers', [1, 2])
def test_pmap_goes_on_after_a_failure(workers):
    res = dict(pmap(odd, range(8), workers))
    assert sorted(res) == list(range(8))
    assert [isinstance(res[i], InputError) and str(res[i]) == f'{i}: is even' for i in range(0, 8, 2)] == [True]*4
    assert (os.getpid() in res.values()) == (workers == 1)
    assert list(pmap(odd, [])) == []

def test_pmap_uses_the_backend_of_the_caller():
    from joblib import parallel_config
    with parallel_config(backend='threading'): res = dict(pmap(odd, [1, 3], 2))
    assert set(res.values()) == {os.getpid()}

def test_an_error_keeps_its_parts_between_processes():
    import pickle
    e = pickle.loads(pickle.dumps(InputError('a', 'b', 'c', 'spacing')))
    assert (str(e), e.code) == ('a: b; c', 'spacing') and isinstance(e, ValueError)
    json.dumps(Geometry((1, 2, 3), (1., 1., 1.), (0., 0., 0.), (1.,)*9).to_dict())
