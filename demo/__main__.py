import sys

from .minilm import main

sys.exit(main())
