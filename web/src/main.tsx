import { render } from "preact";
import "./shell/theme.css";
import "./shell/shell.css";
import { App } from "./shell/app";
import { applyTheme } from "./shell/theme";

applyTheme();
render(<App />, document.getElementById("page")!);
