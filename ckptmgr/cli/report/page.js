// Draws the charts of the report with plotly.js, which is on this page, from the JSON in #charts.
"use strict";
(() => {
  const root = document.documentElement;
  const { charts, resumed } = JSON.parse(document.getElementById("charts").textContent);
  const chosen = { x: "step", y: "linear", theme: "auto" };
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const coarse = matchMedia("(pointer: coarse)").matches;
  const names = { x: { step: "step", time: "time (UTC)" } };

  // Labels of plotly.js may hold a few HTML tags: names are no HTML.
  const escape = text => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

  const wrap = text => escape(text).replace(/(.{50,70}?[\s,/]|.{70})/g, "$1<br>");

  const short = (text, most) => (text.length > most ? `${text.slice(0, most - 3)}...` : text);

  const utc = time => (time === null ? "" : `${new Date(time).toISOString().slice(0, 19).replace("T", " ")} UTC`);

  function size(bytes) {
    for (const unit of ["B", "kB", "MB", "GB", "TB"]) {
      if (bytes < 999.5 || unit === "TB") return `${Number(bytes.toPrecision(3))} ${unit}`;
      bytes /= 1000;
    }
  }

  function value(y, unit) {
    if (y === null) return "NaN or infinite";
    if (unit === "B") return size(y);
    if (unit === "B/s") return `${size(y)}/s`;
    return `${Number(y.toPrecision(6))}${unit ? ` ${unit}` : ""}`;
  }

  function palette() {
    const style = getComputedStyle(root);
    return Object.fromEntries(
      ["page", "ink", "soft", "rule", "data", "second", "bad"].map(name => [name, style.getPropertyValue(`--${name}`).trim()])
    );
  }

  // ---------------------------------------------------------------- points

  function under_the_pointer(chart, trace, at) {
    const what = trace.text ? wrap(trace.text[at]) : `${escape(short(trace.name, 60))}: ${value(trace.y[at], chart.unit)}`;
    return [trace.text ? "" : `step ${trace.step[at]}`, what, utc(trace.time[at])].filter(Boolean).join("<br>");
  }

  function drawn(chart, trace, colours) {
    const xs = trace[chosen.x];
    const order = xs.map((_, at) => at).filter(at => xs[at] !== null).sort((one, other) => xs[one] - xs[other] || one - other);
    const colour = colours[trace.role];
    const shape = trace.line === "hv" ? { shape: "hv" } : { dash: trace.line };
    return {
      type: "scatter",
      mode: trace.line ? "lines+markers" : "markers",
      name: escape(short(trace.name, 40)),
      x: order.map(at => xs[at]),
      y: order.map(at => trace.y[at]),
      hovertext: order.map(at => under_the_pointer(chart, trace, at)),
      hoverinfo: "text",
      line: { color: colour, width: 2, ...shape },
      marker: {
        color: colour,
        symbol: trace.symbol,
        size: trace.mark || (chart.kind === "marks" ? 12 : order.length > 100 ? 4 : 7),
        line: { color: colour, width: 2.5 },
      },
    };
  }

  function axes(chart, colours) {
    const line = { gridcolor: colours.rule, linecolor: colours.soft, zerolinecolor: colours.rule, ticks: "outside", tickcolor: colours.soft };
    const x = { ...line, title: { text: names.x[chosen.x], standoff: 6 }, showline: true, automargin: true };
    Object.assign(x, chosen.x === "time" ? { type: "date" } : { type: "linear", exponentformat: "none", separatethousands: true });
    const y = { ...line, automargin: true, exponentformat: "power" };
    if (chart.kind === "marks") {
      Object.assign(y, { type: "category", categoryorder: "array", categoryarray: chart.lanes, range: [-0.5, chart.lanes.length - 0.5], ticks: "", fixedrange: true });
    } else {
      Object.assign(y, { type: is_logarithmic(chart) ? "log" : "linear", rangemode: chart.unit ? "tozero" : "normal", range: chart.unit || is_logarithmic(chart) ? undefined : range(chart), ticksuffix: chart.unit === "s" ? " s" : chart.unit || "" });
      if (chart.unit && chart.unit.startsWith("B")) Object.assign(y, { exponentformat: "SI" });
    }
    return { xaxis: x, yaxis: y };
  }

  function resumptions(colours) {
    const line = { color: colours.soft, width: 1.5, dash: "dot" };
    const xs = resumed[chosen.x].filter(x => x !== null);
    return xs.map(x => ({ type: "line", x0: x, x1: x, y0: 0, y1: 1, yref: "paper", layer: "below", line }));
  }

  // The values of a metric that never changes: plotly.js would show them from -1 to 1.
  function range(chart) {
    const found = chart.traces.flatMap(trace => trace.y).filter(y => y !== null);
    const [least, most] = [Math.min(...found), Math.max(...found)];
    return least === most && least !== 0 ? [least - Math.abs(least) / 2, least + Math.abs(least) / 2] : undefined;
  }

  const is_positive = chart => chart.traces.some(trace => trace.y.some(y => y > 0));
  const is_logarithmic = chart => chosen.y === "log" && chart.kind === "line" && is_positive(chart);

  // ---------------------------------------------------------------- the treemap

  function rectangles(chart, colours) {
    const label = name => escape(short(name, 40));
    return {
      type: "treemap",
      ids: chart.names.map((_, at) => `n${at}`),
      parents: chart.parents.map(at => (at < 0 ? "" : `n${at}`)),
      labels: chart.names.map(label),
      values: chart.values,
      text: chart.texts.map(escape),
      hovertext: chart.names.map((name, at) => `${wrap(path(chart, at) || name)}<br>${escape(chart.texts[at])}`),
      hoverinfo: "text",
      textinfo: "label+text",
      branchvalues: "total",
      maxdepth: 4,
      tiling: { pad: 2, packing: "squarify" },
      marker: {
        colors: chart.depths.map(depth => mixed(colours.page, colours.data, [0.06, 0.16, 0.3, 0.42, 0.5][Math.min(depth, 4)])),
        line: { color: colours.page, width: 1 },
        pad: { t: 22, l: 3, r: 3, b: 3 },
      },
      textfont: { color: colours.ink, size: 13 },
      pathbar: { visible: true, thickness: 22, textfont: { color: colours.ink, size: 13 } },
      root: { color: colours.page },
    };
  }

  function path(chart, at) {
    const found = [];
    for (; chart.parents[at] >= 0; at = chart.parents[at]) found.unshift(chart.names[at]);
    return found.length ? found.reduce((module, name) => (name.startsWith("[") ? module + name : `${module}.${name}`)) : "";
  }

  function mixed(one, other, share) {
    const parts = hex => [1, 3, 5].map(at => parseInt(hex.slice(at, at + 2), 16));
    const [from, to] = [parts(one), parts(other)];
    return `rgb(${from.map((part, at) => Math.round(part + (to[at] - part) * share)).join(",")})`;
  }

  // ---------------------------------------------------------------- drawing

  function layout(chart, colours) {
    const label = { bgcolor: colours.page, bordercolor: colours.soft, font: { color: colours.ink, size: 13 }, align: "left" };
    const common = {
      paper_bgcolor: colours.page,
      plot_bgcolor: colours.page,
      font: { family: "system-ui, sans-serif", size: 13, color: colours.soft },
      hoverlabel: label,
      modebar: { bgcolor: "rgba(0,0,0,0)", color: colours.soft, activecolor: colours.ink },
      dragmode: coarse ? false : "zoom",
    };
    if (chart.kind === "treemap") return { ...common, margin: { t: 4, l: 4, r: 4, b: 4 }, uirevision: "sizes", uniformtext: { minsize: 9, mode: "hide" } };
    const showlegend = chart.kind === "marks" || chart.traces.length > 1;
    return {
      ...common,
      ...axes(chart, colours),
      margin: { t: showlegend ? 52 : 30, l: 56, r: 14, b: 46 },
      hovermode: "closest",
      hoverdistance: 40,
      showlegend,
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", bgcolor: "rgba(0,0,0,0)", itemsizing: "constant" },
      shapes: chart.kind === "line" ? resumptions(colours) : [],
      uirevision: `${chosen.x} ${chosen.y}`,
    };
  }

  const settings = {
    responsive: true,
    displaylogo: false,
    displayModeBar: coarse ? true : "hover",
    // Named one by one: the default has a button that sends the chart to a server.
    showSendToCloud: false,
    plotlyServerURL: "",
  };
  const buttons = { line: [["toImage", "zoomIn2d", "zoomOut2d", "resetScale2d"]], treemap: [["toImage"]] };

  function draw() {
    const colours = palette();
    for (const chart of charts) {
      const traces = chart.kind === "treemap" ? [rectangles(chart, colours)] : chart.traces.map(trace => drawn(chart, trace, colours));
      Plotly.react(chart.id, traces, layout(chart, colours), { ...settings, modeBarButtons: buttons[chart.kind] || buttons.line });
    }
  }

  function choose(button) {
    chosen[button.dataset.set] = button.dataset.to;
    for (const each of document.querySelectorAll(`[data-set=${button.dataset.set}]`))
      each.setAttribute("aria-pressed", String(each === button));
    root.dataset.theme = chosen.theme;
    draw();
  }

  root.classList.add("live");
  for (const table of document.querySelectorAll("details")) table.open = false;
  for (const button of document.querySelectorAll("[data-set]")) button.addEventListener("click", () => choose(button));
  dark.addEventListener("change", draw);
  draw();
})();
