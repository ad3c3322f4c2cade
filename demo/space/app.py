# Copyright 2026 The TheWorld developers. Licensed under the Apache License, Version 2.0.
from theworld.demo.app import main


main([])
