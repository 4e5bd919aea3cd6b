(function (root) {
  "use strict";
  const data = JSON.parse(root.querySelector('[data-part="data"]').textContent);
  const choice = (name) => root.querySelector(`[data-choice="${name}"]`);
  const part = (name) => root.querySelector(`[data-part="${name}"]`);
  const percent = (x) => (x === null || x === undefined ? "undefined" : `${Math.round(100 * x)} %`);

  function element(tag, text, kind) {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    if (kind) made.className = kind;
    return made;
  }

  function fill(select, options, wanted) {
    const kept = options.some(([value]) => value === wanted) ? wanted : (options[0] || [""])[0];
    select.replaceChildren(...options.map(([value, text]) => {
      const option = element("option", text);
      option.value = value;
      return option;
    }));
    select.value = kept;
  }

  const unique = (values) => [...new Set(values)];
  const pairs = (a, b) => data.merges.filter((m) => m.tasks.includes(a) && (!b || m.tasks.includes(b)));

  function choose() {
    const a = choice("a").value;
    const partners = unique(pairs(a).flatMap((m) => m.tasks)).filter((task) => task !== a);
    fill(choice("b"), partners.map((task) => [task, task]), choice("b").value);
    const both = pairs(a, choice("b").value);
    const rules = unique(both.map((m) => m.rule));
    fill(choice("rule"), rules.map((rule) => [rule, data.labels[rule]]), choice("rule").value);
    const arms = unique(both.filter((m) => m.rule === choice("rule").value).map((m) => m.arm));
    fill(choice("arm"), arms.map((arm) => [arm, arm]), choice("arm").value);
    show();
  }

  function chosen() {
    const [rule, arm] = [choice("rule").value, choice("arm").value];
    const both = pairs(choice("a").value, choice("b").value);
    return both.find((m) => m.rule === rule && m.arm === arm);
  }

  function at(curve, dose) {
    const after = curve.findIndex(([x]) => x >= dose);
    if (after < 0) return curve.length ? curve[curve.length - 1][1] : null;
    if (after === 0) return curve[0][1];
    const [[x0, y0], [x1, y1]] = [curve[after - 1], curve[after]];
    return y0 + ((y1 - y0) * (dose - x0)) / (x1 - x0);
  }

  function bar(name, score, hurt) {
    const made = element("div", undefined, hurt ? "bar hurt" : "bar");
    const width = element("span");
    width.style.width = `${100 * Math.min(1, score || 0)}%`;
    made.append(width, element("b", `${name}: ${percent(score)} right`));
    return made;
  }

  function line(tag, attributes, text) {
    const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    if (text) made.textContent = text;
    return made;
  }

  function drawing(curve, dose, merged) {
    const svg = line("svg", { viewBox: "0 0 320 150", role: "img" });
    const [x, y] = [(v) => 30 + 220 * v, (v) => 120 - 105 * v];
    const points = curve.map(([d, s]) => `${x(d)},${y(s)}`).join(" ");
    svg.append(
      line("line", { x1: 30, x2: 306, y1: 120, y2: 120, stroke: "#999" }),
      line("line", { x1: 30, x2: 30, y1: 15, y2: 120, stroke: "#999" }),
      line("polyline", { points, fill: "none", stroke: "#0072B2", "stroke-width": 2 }),
      line("line", { x1: 30, x2: 306, y1: y(merged), y2: y(merged), stroke: "#D55E00", "stroke-dasharray": "4 3" }),
      line("circle", { cx: x(dose), cy: y(at(curve, dose) || 0), r: 4, fill: "#0072B2" }),
      line("text", { x: 30, y: 143, "font-size": 11 }, "dose of the task vector alone: 0 base, 1 specialist"),
      line("text", { x: 302, y: y(merged) - 4, "font-size": 11, "text-anchor": "end", fill: "#D55E00" }, "the merge"),
      line("text", { x: 4, y: y(1) + 4, "font-size": 11 }, "1"),
      line("text", { x: 4, y: y(0) + 4, "font-size": 11 }, "0"),
    );
    return svg;
  }

  function cell([correct, kind, text]) {
    if (correct === null) return element("td", "not recorded");
    const right = correct === 1;
    const silent = kind === "empty" || text === "";
    const made = element("td", undefined, right ? "right" : silent ? "empty" : "wrong");
    const words = text === null ? (right ? "right" : "wrong") : text || "(nothing)";
    made.append(element("div", words));
    if (!right && kind) made.append(element("small", kind));
    return made;
  }

  // What all prompts of a task begin with, an instruction for example, is shown once.
  function shared(prompts) {
    const first = prompts.map((asked) => asked.prompt.split("\n")[0]);
    return prompts.length > 1 && new Set(first).size === 1 ? first[0] + "\n" : "";
  }

  function answers(task, merge) {
    const table = element("table");
    const head = element("tr");
    head.append(...["prompt and right answer", "base", "specialist", "merge"].map((name) => element("th", name)));
    table.append(head);
    const instruction = shared(data.prompts[task]);
    data.prompts[task].forEach((asked, i) => {
      const row = element("tr");
      const prompt = element("td");
      const words = asked.prompt.slice(asked.prompt.startsWith(instruction) ? instruction.length : 0);
      prompt.append(element("div", words || `example ${i + 1}`), element("b", asked.right));
      row.append(prompt, cell(asked.base), cell(asked.specialist), cell(merge.answers[task][i]));
      row.lastChild.dataset.merge = task;
      table.append(row);
    });
    return table;
  }

  function side(place, task, merge, dose) {
    const alone = at(data.doses[task], dose);
    place.replaceChildren(
      element("h3", task),
      element("p", shared(data.prompts[task]).trim()),
      bar("base", data.base[task]),
      bar("specialist", data.specialist[task]),
      bar(`alone at dose ${dose}`, alone),
      bar("merge", merge.score[task], merge.loss[task] < -30),
      drawing(data.doses[task], dose, merge.score[task] || 0),
      answers(task, merge),
    );
  }

  function show() {
    const merge = chosen();
    if (!merge) return;
    const dose = Number(choice("dose").value);
    choice("told").textContent = dose;
    const tasks = [choice("a").value, choice("b").value];
    const losses = tasks.map((task) => `${task} ${merge.loss[task] === null ? "undefined" : Math.round(merge.loss[task]) + " %"}`);
    part("verdict").textContent = `Merging loss: ${losses.join(", ")}. Orange: more than 30 % lost.`;
    side(part("first"), tasks[0], merge, dose);
    side(part("second"), tasks[1], merge, dose);
  }

  function worst() {
    const defaults = data.merges.filter((m) => m.arm === "default");
    const loss = (m) => Math.min(...m.tasks.map((task) => m.loss[task] ?? 0));
    return defaults.reduce((least, m) => (loss(m) < loss(least) ? m : least), defaults[0] || data.merges[0]);
  }

  const start = worst();
  const order = start ? [...start.tasks].sort((p, q) => (start.loss[p] ?? 0) - (start.loss[q] ?? 0)) : [];
  const merged = new Set(data.merges.flatMap((m) => m.tasks));
  fill(choice("a"), data.tasks.filter((task) => merged.has(task)).map((task) => [task, task]), order[0]);
  fill(choice("b"), [[order[1], order[1]]], order[1]);
  if (start) {
    fill(choice("rule"), [[start.rule, ""]], start.rule);
    fill(choice("arm"), [[start.arm, ""]], start.arm);
  }
  for (const name of ["a", "b", "rule", "arm"]) choice(name).addEventListener("change", choose);
  choice("dose").addEventListener("input", show);
  choose();
})(document.currentScript.closest("section"));
