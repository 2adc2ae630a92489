{{- define "fedsecure.name" -}}
{{ .Release.Name }}-aggregator
{{- end -}}
{{- define "fedsecure.selector" -}}
app.kubernetes.io/name: fedsecure
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}
{{- define "fedsecure.labels" -}}
{{ include "fedsecure.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end -}}
