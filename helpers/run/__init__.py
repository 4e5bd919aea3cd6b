"""The runner's door: what a notebook, a test or the command line asks of it."""

from helpers.run.chain import run
from helpers.run.execute import NotebookFailed, machine, versions
from helpers.run.folders import study_folder
from helpers.run.overview import cost_table, costs
from helpers.run.profiles import all_profiles, declared, notebooks, steps, typed
from helpers.run.record import executed, finished
from helpers.run.students import check
