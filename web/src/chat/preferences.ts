// What the next conversation begins with: what was chosen last, in this browser.
import { kept } from "../shell/kept";
import { DEFAULTS, type Settings } from "./types";

export const chosenModel = kept<string | null>("qiusuo.model", null);
export const chosenSettings = kept<Settings>("qiusuo.settings", DEFAULTS);
chosenSettings.value = { ...DEFAULTS, ...chosenSettings.value };
