"`python -m autounet_nb` is the command `autounet`"
import sys
from .app.cli import main

sys.exit(main())
