"Slices, contours and the figure of a case show what the arrays hold."
import numpy as np, pytest
from autounet_nb.core.errors import InputError
from autounet_nb.data.phantom import phantom
from autounet_nb.viz.scan import show_case

def test_show_case(tmp_path):
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    x, y = phantom((10, 40, 30), (4, 1, 1), classes=3, rng=1)
    fig = show_case(x, y, np.roll(y, 2, 1), (4, 1, 1), title='one')
    assert len(fig.axes) == 3 and fig._suptitle.get_text() == 'one'
    assert [ax.images[0].get_array().shape for ax in fig.axes] == [(40, 30), (10, 30), (10, 40)]
    assert [round(ax.get_aspect(), 6) for ax in fig.axes] == [1, 4, 4]
    z = int(np.median(np.nonzero(y)[0]))
    assert np.array_equal(fig.axes[0].images[0].get_array(), x[0, z])
    assert len(fig.axes[0].collections) == len(np.unique(y[z])) - 1 + len(np.unique(np.roll(y, 2, 1)[z])) - 1
    fig.savefig(tmp_path/'a.png'); plt.close(fig)
    assert len((fig := show_case(x[:, :1])).axes) == 1 and not fig.axes[0].collections; plt.close(fig)
    assert len((fig := show_case(x[0], prediction=y)).axes) == 3; plt.close(fig)
    ct = phantom((1, 40, 30), modality='CT')[0]
    assert (fig := show_case(ct)).axes[0].images[0].get_clim() == (-160, 240); plt.close(fig)
    assert (fig := show_case(ct, window=(0, 9))).axes[0].images[0].get_clim() == (0, 9); plt.close(fig)
    with pytest.raises(InputError, match='label: the mask has shape .* the image'): show_case(x, y[:5])
    with pytest.raises(InputError, match='prediction: the mask has shape'): show_case(x, y, y[:5])
    assert not plt.get_fignums()
